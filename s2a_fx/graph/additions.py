"""Residual additions, found from the data flow alone: `x + f(x)`, whoever wrote it.

    x ──────────────── view, identity, ... ──┐
    │                                        + ── x + f(x)
    └── norm ── layers ── gate ── drop path ─┘

An addition is residual if one operand shows a value x and the other is computed from it. A view, an identity, and an earlier
residual addition show x: so the second of two parallel branches is added to the x of the first. Sizes that are read of a value
carry no data.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from s2a_fx.graph.calls import call_of
from s2a_fx.graph.flow import attribute
from s2a_fx.graph.provenance import owner_stack
from s2a_fx.graph.regions import modules_within


@dataclass(frozen=True)
class Addition:
    """A residual addition.

    Attributes:
        node: the addition.
        entry: x.
        shortcut: the operand that shows x.
        branch: the other operand, f(x).
        nodes: all that is computed on the ways from x to the sum, the sum included.
        home: path of the innermost module around the branch and the sum; "" for the model itself.
    """

    node: fx.Node
    entry: fx.Node
    shortcut: fx.Node
    branch: fx.Node
    nodes: frozenset[fx.Node]
    home: str


class DataFlow:
    """Which node's data a node reads.

    Args:
        gm: the graph module; its nodes carry shapes.

    Attributes:
        order: each node's position in the graph.
        dependent: the nodes whose elements are computed from the model's input.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.order = {node: index for index, node in enumerate(gm.graph.nodes)}
        self.dependent: set[fx.Node] = set()
        for node in gm.graph.nodes:
            if not is_size(node) and (node.op == "placeholder" or any(o in self.dependent for o in node.all_input_nodes)):
                self.dependent.add(node)

    def sources(self, node: fx.Node) -> list[fx.Node]:
        """What a node reads the elements of, parameters left out."""
        return [o for o in node.all_input_nodes if o.op != "get_attr" and not is_size(o)]

    def parameters(self, node: fx.Node) -> list[nn.Parameter]:
        """The parameters that a node reads."""
        called = modules_within(self.gm.get_submodule(str(node.target))) if node.op == "call_module" else ()
        own = [parameter for module in called for parameter in module.parameters(recurse=False)]
        values = [attribute(self.gm, str(o.target)) for o in node.all_input_nodes if o.op == "get_attr"]
        return own + [value for value in values if isinstance(value, nn.Parameter)]

    def is_layer(self, node: fx.Node) -> bool:
        """Whether a node multiplies by a matrix of parameters."""
        return any(parameter.ndim > 1 for parameter in self.parameters(node))

    def between(self, start: fx.Node, end: fx.Node) -> set[fx.Node]:
        """The nodes on the ways from `start` to `end`, `end` included and `start` not; empty if there is no way."""
        first = self.order[start]
        above, stack = {end}, [end]
        while stack:
            for source in self.sources(stack.pop()):
                if self.order[source] > first and source not in above:
                    above.add(source)
                    stack.append(source)
        found: set[fx.Node] = set()
        for node in sorted(above, key=self.order.__getitem__):
            if any(source is start or source in found for source in self.sources(node)):
                found.add(node)
        return found if end in found else set()

    def dominator(self, node: fx.Node) -> fx.Node | None:
        """The nearest node through which alone the node's operands come from the input; None if only inputs are such."""
        frontier = {o for o in self.sources(node) if o in self.dependent}
        while len(frontier) > 1:  # the last of them cannot be what the others come from
            last = max(frontier, key=self.order.__getitem__)
            if last.op == "placeholder":
                return None
            frontier.remove(last)
            frontier |= {o for o in self.sources(last) if o in self.dependent}
        return next(iter(frontier), None)


def residual_additions(flow: DataFlow) -> dict[fx.Node, Addition]:
    """The residual additions in the order of the graph, by their nodes."""
    found: dict[fx.Node, Addition] = {}
    for node in flow.gm.graph.nodes:
        if node in flow.dependent and (operands := summands(flow.gm, node)):
            addition = next((a for pair in (operands, operands[::-1]) if (a := _residual(flow, node, pair, found))), None)
            if addition is not None:
                found[node] = addition
    return found


def summands(gm: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two tensors that a node adds; None for what is no such addition, or one with a factor."""
    call = call_of(gm, node)
    if call is None or call.operator is not torch.add or call.options.get("alpha", 1) != 1:
        return None
    operands = tuple(o for o in call.operands.values() if isinstance(o, fx.Node) and o.op != "get_attr")
    return operands if len(operands) == 2 and operands[0] is not operands[1] else None  # type: ignore[return-value]


def shown_values(gm: fx.GraphModule, node: fx.Node, additions: Mapping[fx.Node, Addition]) -> Iterator[fx.Node]:
    """A node, what it shows by a view, an identity or a residual addition, what that shows, and so on."""
    current: fx.Node | None = node
    while current is not None:
        yield current
        current = additions[current].shortcut if current in additions else _viewed(gm, current)


def is_size(node: fx.Node) -> bool:
    """Whether a node's value is a number, or a shape of numbers."""
    value = node.meta.get("val")
    numbers = value if isinstance(value, tuple) and value else (value,)
    return all(isinstance(number, bool | int | float | torch.SymInt | torch.SymFloat) for number in numbers)


def is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _viewed(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The value of which a node shows all elements."""
    call = call_of(gm, node)
    if call is None or not (call.is_view or call.operator is nn.Identity):
        return None
    source = call.input
    same = is_tensor(node) and is_tensor(source) and node.meta["val"].numel() == source.meta["val"].numel()
    return source if same else None


def _residual(flow: DataFlow, node: fx.Node, operands: tuple[fx.Node, fx.Node], before: dict[fx.Node, Addition]) -> Addition | None:
    shortcut, branch = operands
    for entry in shown_values(flow.gm, shortcut, before):
        if entry.op == "get_attr":
            return None
        if inside := flow.between(entry, branch):
            return Addition(node, entry, shortcut, branch, frozenset(flow.between(entry, node)), _home({*inside, node}))
    return None


def _home(nodes: set[fx.Node]) -> str:
    """The path of the innermost module around all nodes."""
    return (common_beginning([list(owner_stack(node)) for node in nodes]) or [""])[-1]


def common_beginning(sequences: Sequence[Sequence[str]]) -> list[str]:
    """What all sequences begin with."""
    columns = zip(*sequences, strict=False)
    return [column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, columns)]
