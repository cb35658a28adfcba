"""One graph for both modes: align what a model computes in train mode with what it computes in eval mode.

    both      y = f(x)                               one node
    train     y = dropout(x, 0.5, True)              a `TrainingSwitch` of the constants
    eval      y = dropout(x, 0.5, False)
    train     y = x + noise(x); return y, aux(y)     a `ModeRegion`: one module with two bodies
    eval      return x

Nodes that compute the same stay one node, which passes edit for both modes; the rest stands between them in `ModeRegion`s.
"""

import difflib
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx, nn

from s2a_fx.graph import torch_internals
from s2a_fx.graph.edit import add_module, free_path
from s2a_fx.graph.flow import has_effects
from s2a_fx.graph.provenance import owner_path, owner_stack
from s2a_fx.graph.regions import SCOPES, ModeRegion, Scope, scopes_of
from s2a_fx.graph.scopes import close_scopes, common_scopes
from s2a_fx.graph.traced_module import TracedModule
from s2a_fx.graph.training_switch import Difference, TrainingSwitch

_CALLS = ("call_function", "call_method", "call_module")
Pair = tuple[Any, Any]
"""What is read at one place: the value in train mode and the one in eval mode, each a node, a constant, or None for no value."""


@dataclass(eq=False)
class _Gap:
    """Nodes of either mode between nodes that both share, `beside` it; `values` are what the rest of the graph reads of them."""

    train: Sequence[fx.Node] = ()
    eval: Sequence[fx.Node] = ()
    values: list[Pair] = field(default_factory=list)
    beside: Sequence[tuple[fx.Node, fx.Node]] = ()


def align_modes(model: nn.Module, train: fx.Graph, evaluation: fx.Graph) -> fx.Graph:
    """The graph that computes what `train` does in train mode, and what `evaluation` does in eval mode.

    Args:
        model: whose graphs these are; gets the switches and regions that the result calls.
        train, evaluation: flat captured graphs.
    """
    if _is_same(train, evaluation):
        return train
    return _Alignment(model, train, evaluation).build()


def _is_same(train: fx.Graph, evaluation: fx.Graph) -> bool:
    if len(train.nodes) != len(evaluation.nodes):
        return False
    twins: dict[fx.Node, fx.Node] = {}
    for a, b in zip(train.nodes, evaluation.nodes, strict=True):
        arguments = fx.node.map_arg((b.args, b.kwargs), lambda node: twins.get(node, node))
        if (a.op, a.target, _contexts(a)) != (b.op, b.target, _contexts(b)) or not _is_equal((a.args, a.kwargs), arguments):
            return False
        twins[b] = a
    return True


def _contexts(node: fx.Node) -> tuple[Any, ...]:
    return tuple((scope.kind, scope.options) for scope in scopes_of(node))


def _is_equal(a: Any, b: Any) -> bool:
    """Equality of arguments in which True is not 1, and NaN is equal to itself."""
    if type(a) is not type(b):
        return False
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_is_equal, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(map(_is_equal, a.values(), b.values()))
    return a is b or bool(a == b) or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


class _Alignment:
    """Builds the graph of both modes from left to right."""

    def __init__(self, model: nn.Module, train: fx.Graph, evaluation: fx.Graph) -> None:
        self.model = model
        self.outputs = train.output_node(), evaluation.output_node()
        self.inputs = train.find_nodes(op="placeholder"), evaluation.find_nodes(op="placeholder")
        self.pieces = list(_pieces(train, evaluation))
        self.scopes = _scopes_of_both(self.pieces)
        _plan_values(self.pieces, _result_pairs(*self.outputs))
        self.graph = fx.Graph(tracer_cls=torch_internals.tracer_of(train))
        self.values: tuple[dict[fx.Node, fx.Node], dict[fx.Node, fx.Node]] = ({}, {})  # of train and eval mode
        self.reads: dict[str, fx.Node] = {}
        self.joined: dict[tuple[int, int], fx.Node] = {}

    def build(self) -> fx.Graph:
        for a, b in zip(*self.inputs, strict=True):
            self.values[0][a] = self.values[1][b] = self.graph.node_copy(a)
        for piece in self.pieces:
            if isinstance(piece, _Gap):
                self._add_gap(piece, like=(*piece.train, *piece.eval)[0])
            else:
                self._add_node(*piece)
        self.graph.output(tuple(self._join(pair, like=self.outputs[0]) for pair in _result_pairs(*self.outputs)))
        return self.graph

    def _value(self, node: fx.Node, mode: int) -> fx.Node:
        """The node of the result that has the value of a node of one mode."""
        if node.op != "get_attr":
            return self.values[mode][node]
        path = str(node.target)
        if path not in self.reads:
            self.reads[path] = self.graph.node_copy(node)
        return self.reads[path]

    def _add_node(self, a: fx.Node, b: fx.Node) -> None:
        """Add what both modes compute, with a switch where constants differ."""
        pairs = iter(list(_argument_pairs(a, b)))
        args, kwargs = fx.node.map_arg((a.args, a.kwargs), lambda _: self._join(next(pairs), like=a))
        target, op = a.target, a.op
        if differences := _differences(a, b):
            op, target = "call_module", free_path(self.model, "training_switches", a.name)
            add_module(self.model, target, TrainingSwitch(a.target, differences), like=owner_path(a))  # type: ignore[arg-type]
        node = self.graph.create_node(op, target, args, kwargs, a.name)
        node.meta = {**a.meta, SCOPES: _join_scopes(self._scopes(a, 0), self._scopes(b, 1))}
        self.values[0][a] = self.values[1][b] = node

    def _join(self, pair: Pair, like: fx.Node) -> Any:
        """The node, or constant, that has one value in train mode and the other in eval mode."""
        key = id(pair[0]), id(pair[1])
        if key not in self.joined:
            found = [self._value(v, mode) if isinstance(v, fx.Node) else v for mode, v in enumerate(pair)]
            if found[0] is found[1] or (not nodes_in(found) and _is_equal(*found)):
                return found[0]
            self._add_gap(_Gap(values=[pair]), like)
        return self.joined[key]

    def _add_gap(self, gap: _Gap, like: fx.Node) -> None:
        """Add a region whose two bodies are the gap's nodes in train mode and those in eval mode."""
        parts = gap.train, gap.eval
        around = self._scopes(like, 0) if not any(parts) else _join_scopes(*(self._scopes_of_part(gap, mode) for mode in (0, 1)))
        read: dict[fx.Node, None] = {}
        for mode, part in enumerate(parts):
            own = set(part)
            wanted = [*(o for node in part for o in node.all_input_nodes), *(pair[mode] for pair in gap.values)]
            read |= dict.fromkeys(self._value(n, mode) for n in wanted if isinstance(n, fx.Node) and n not in own)
        body, eval_body = (self._body(gap, mode, list(read), around) for mode in (0, 1))
        writes = any(has_effects(self.model, node) for part in parts for node in part)
        path = free_path(self.model, owner_path(like), "mode_region")
        add_module(self.model, path, ModeRegion(body, eval_body, writes), like=owner_path(like))
        call = self.graph.call_module(path, tuple(read))
        call.meta = {SCOPES: around, "nn_module_stack": owner_stack(like)}
        for index, pair in enumerate(gap.values):
            value = self.graph.call_function(operator.getitem, (call, index))
            value.meta = dict(call.meta)
            self.joined[id(pair[0]), id(pair[1])] = value
            for mode, part in enumerate(parts):
                if pair[mode] in part:
                    self.values[mode].setdefault(pair[mode], value)

    def _scopes_of_part(self, gap: _Gap, mode: int) -> tuple[Scope, ...]:
        """The scopes around what one mode computes in a gap, or would if it computed anything."""
        nodes = (gap.train, gap.eval)[mode] or [pair[mode] for pair in gap.beside]
        return common_scopes([self._scopes(node, mode) for node in nodes]) if nodes else ()

    def _scopes(self, node: fx.Node, mode: int) -> tuple[Scope, ...]:
        return tuple(self.scopes[mode][scope] for scope in scopes_of(node))

    def _body(self, gap: _Gap, mode: int, read: list[fx.Node], around: tuple[Scope, ...]) -> fx.GraphModule:
        """What one mode computes in a gap: from the nodes that are `read` to its values."""
        graph = fx.Graph()
        operands = {node: graph.placeholder(f"operand_{index}") for index, node in enumerate(read)}
        copies: dict[fx.Node, fx.Node] = {}

        def copy_of(node: fx.Node) -> fx.Node:
            return copies[node] if node in copies else operands[self._value(node, mode)]

        for node in (gap.train, gap.eval)[mode]:
            copies[node] = graph.node_copy(node, copy_of)
            copies[node].meta = {**node.meta, SCOPES: tuple(s for s in self._scopes(node, mode) if s not in around)}
        results = [pair[mode] for pair in gap.values]
        graph.output(tuple(copy_of(result) if isinstance(result, fx.Node) else result for result in results))
        body = TracedModule(self.model, graph, "Mode")
        close_scopes(body)
        body.recompile()
        return body


def _pieces(train: fx.Graph, evaluation: fx.Graph) -> Iterator[tuple[fx.Node, fx.Node] | _Gap]:
    """Both graphs as pairs of nodes that compute the same, and gaps between them, in order."""
    ours = [node for node in train.nodes if node.op in _CALLS]
    theirs = [node for node in evaluation.nodes if node.op in _CALLS]
    matcher = difflib.SequenceMatcher(None, [_key(n) for n in ours], [_key(n) for n in theirs], autojunk=False)
    i = j = 0
    for start, other, size in matcher.get_matching_blocks():
        if start > i or other > j:
            beside = [(ours[k], theirs[m]) for k, m in ((i - 1, j - 1), (start, other)) if k >= 0 and m >= 0 and size]
            yield _Gap(ours[i:start], theirs[j:other], beside=beside if len(beside) == 2 else ())
        yield from zip(ours[start : start + size], theirs[other : other + size], strict=True)
        i, j = start + size, other + size


def _key(node: fx.Node) -> tuple[Any, ...]:
    """What two nodes must share to be one: the call, the module around it, its contexts, and where it reads nodes.

    Constants must be equal, too, but for whole arguments of a function: a `TrainingSwitch` can hold both.
    """
    switches = node.op == "call_function"
    arguments = [*enumerate(node.args), *node.kwargs.items()]
    shown = tuple((name, None if switches and not nodes_in(arg) else _shape(arg)) for name, arg in arguments)
    contexts = tuple(context for context in _contexts(node) if context[0] != "checkpoint")
    return node.op, node.target, owner_path(node), shown, contexts


def _shape(argument: Any) -> str:
    """An argument with all nodes alike."""
    return repr(fx.node.map_aggregate(argument, lambda leaf: "node" if isinstance(leaf, fx.Node) else leaf))


def nodes_in(argument: Any) -> list[fx.Node]:
    """The nodes in an argument, in order, each as often as it occurs."""
    found: list[fx.Node] = []
    fx.node.map_arg(argument, lambda node: found.append(node))  # type: ignore[arg-type, return-value, func-returns-value]
    return found


def _argument_pairs(a: fx.Node, b: fx.Node) -> Iterator[Pair]:
    """The nodes that two nodes with one key read at the same places."""
    yield from zip(nodes_in((a.args, a.kwargs)), nodes_in((b.args, b.kwargs)), strict=True)


def _result_pairs(a: fx.Node, b: fx.Node) -> list[Pair]:
    """The results of both modes side by side; the mode that returns fewer has None for the rest."""
    xs: Any = a.args[0]
    ys: Any = b.args[0]
    return [(xs[i] if i < len(xs) else None, ys[i] if i < len(ys) else None) for i in range(max(len(xs), len(ys)))]


def _differences(a: fx.Node, b: fx.Node) -> tuple[Difference, ...]:
    """The arguments without nodes in which two calls differ."""
    pairs: list[tuple[int | str, Any, Any]] = [(i, x, y) for i, (x, y) in enumerate(zip(a.args, b.args, strict=True))]
    pairs += [(key, a.kwargs[key], b.kwargs[key]) for key in a.kwargs]
    return tuple(Difference(*pair) for pair in pairs if not nodes_in(pair[1]) and not _is_equal(*pair[1:]))


def _plan_values(pieces: Sequence[tuple[fx.Node, fx.Node] | _Gap], results: Sequence[Pair]) -> None:
    """Tell each gap what is read of it: pairs by the nodes of both modes, single values by what comes later."""
    gaps = [piece for piece in pieces if isinstance(piece, _Gap)]
    nodes = [(*piece.train, *piece.eval) if isinstance(piece, _Gap) else piece for piece in pieces]
    places = {node: index for index, piece in enumerate(nodes) for node in piece}
    home = {node: index for node, index in places.items() if isinstance(pieces[index], _Gap)}
    read = [pair for piece in pieces if not isinstance(piece, _Gap) for pair in _argument_pairs(*piece)]
    alone: list[fx.Node] = []
    for pair in (*read, *results):
        last = max((places[v] for v in pair if v in places), default=-1)
        own = [v for v in pair if v in home]
        if own and isinstance(piece := pieces[last], _Gap):
            piece.values.append(pair)
        alone += [v for v in own if home[v] != last]
    alone += [node for node in home for user in node.users if user in home and home[user] != home[node]]
    for gap in gaps:
        for mode, part in enumerate((gap.train, gap.eval)):
            paired = [pair[mode] for pair in gap.values]
            single = [node for node in dict.fromkeys(alone) if node in part and node not in paired]
            gap.values += [(node, None) if mode == 0 else (None, node) for node in single]
        gap.values[:] = {(id(x), id(y)): (x, y) for x, y in gap.values}.values()


def _scopes_of_both(pieces: Sequence[tuple[fx.Node, fx.Node] | _Gap]) -> tuple[dict[Scope, Scope], dict[Scope, Scope]]:
    """What stands for the scopes of train and of eval mode: a context of both is one; a checkpoint of one mode says of which."""
    twins: dict[Scope, Scope] = {}  # scope of eval mode -> the same context in train mode
    found: tuple[dict[Scope, None], dict[Scope, None]] = ({}, {})
    for piece in pieces:
        parts = (piece.train, piece.eval) if isinstance(piece, _Gap) else ((piece[0],), (piece[1],))
        for scopes, part in zip(found, parts, strict=True):
            scopes.update(dict.fromkeys(scope for node in part for scope in scopes_of(node)))
        if not isinstance(piece, _Gap):
            ours, theirs = map(scopes_of, piece)
            if [s.kind for s in ours] == [s.kind for s in theirs]:
                twins |= zip(theirs, ours, strict=True)
    shared = set(twins.values())
    train = {scope: scope if scope in shared else _of_mode(scope, "train") for scope in found[0]}
    evaluation = {scope: twins[scope] if scope in twins else _of_mode(scope, "eval") for scope in found[1]}
    return train, evaluation


def _of_mode(scope: Scope, mode: str) -> Scope:
    """A checkpoint that the model enters in one mode alone; any other scope as it is."""
    return replace(scope, options=(*scope.options, ("modes", (mode,)))) if scope.kind == "checkpoint" else scope


def _join_scopes(train: tuple[Scope, ...], evaluation: tuple[Scope, ...]) -> tuple[Scope, ...]:
    """The scopes that begin both stacks, checkpoints of one mode included, which do nothing in the other."""
    ours, theirs = list(train), list(evaluation)
    joined: list[Scope] = []
    while ours or theirs:
        if ours and theirs and ours[0] == theirs[0]:
            joined.append(ours.pop(0))
            theirs.pop(0)
        elif alone := next((stack for stack in (ours, theirs) if stack and "modes" in dict(stack[0].options)), None):
            joined.append(alone.pop(0))
        else:
            break
    return tuple(joined)
