"""Capture a model's forward by Dynamo, for models that torch.fx cannot follow.

Dynamo's graph takes parameters and buffers as arguments and calls functions. It becomes a flat captured graph:

    Dynamo                                            here
    placeholder of a parameter or buffer              get_attr of the model's own path
    the functions that a layer of torch.nn calls      call_module of the layer
    set_grad_enabled, enter_autocast, exit_autocast   scopes of the nodes between
    tag_activation_checkpoint(body, x)                the nodes of the body, in a checkpoint scope
    a symbolic size                                   x.size(0)
"""

import copy
import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from s2a_fx.errors import TraceError
from s2a_fx.graph import torch_internals
from s2a_fx.graph.fake import fake_tensor
from s2a_fx.graph.fx_capture import THROUGH, Captured
from s2a_fx.graph.inputs import Signature, Structure
from s2a_fx.graph.provenance import module_stack, plain_path
from s2a_fx.graph.regions import SCOPES, Scope


def capture_by_dynamo(model: nn.Module, signature: Signature, inputs: Sequence[torch.Tensor]) -> Captured:
    """Capture `model` in the mode in which it stands.

    Args:
        model: its modules become those of the graph.
        signature: how the model is called.
        inputs: the example's tensors.

    Raises:
        TraceError: Dynamo cannot follow the model as one graph.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    memo: dict[int, Any] = {id(t): fake_tensor(t, mode) for t in tensors.values()}
    leaves = [fake_tensor(t, mode) for t in inputs]
    paths = {id(memo[id(t)]): path for path, t in tensors.items()}
    args, kwargs = signature.arguments(leaves)
    with mode:
        try:
            found = torch_internals.dynamo_graph(copy.deepcopy(model, memo), args, kwargs, leaves)
        except Exception as error:
            raise TraceError(torch_internals.dynamo_refusal(error)) from error
    results, spec = Structure.of(found.result)
    graph = _Rebuilder(model, found, paths, {id(t): i for i, t in enumerate(leaves)}, signature.names).build(results)
    return Captured(graph, spec)


class _Rebuilder:
    """Copies Dynamo's graph, node by node, into one over the model's own attributes."""

    def __init__(
        self,
        model: nn.Module,
        found: "torch_internals.DynamoGraph",
        paths: dict[int, str],
        leaves: dict[int, int],
        names: Sequence[str],
    ) -> None:
        self.model, self.found, self.paths, self.leaves = model, found, paths, leaves
        self.graph = fx.Graph()
        self.inputs = [self.graph.placeholder(name) for name in names]
        self.reads: dict[str, fx.Node] = {}
        self.idents = itertools.count()

    def build(self, results: Sequence[Any]) -> fx.Graph:
        values: dict[fx.Node, Any] = {}
        placeholders = self.found.graph_module.graph.find_nodes(op="placeholder")
        for node, argument in zip(placeholders, self.found.arguments, strict=True):
            values[node] = self._argument(node, argument)
        outputs: Any = self._copy(self.found.graph_module, values, ())
        made = dict(zip(map(id, self.found.markers), outputs, strict=True))
        self.graph.output(tuple(self._result(made, value) for value in results))
        self._call_layers()
        return self.graph

    def _argument(self, node: fx.Node, argument: Any) -> Any:
        if isinstance(argument, torch.Tensor):
            if id(argument) in self.leaves:
                return self.inputs[self.leaves[id(argument)]]
            if id(argument) in self.paths:
                return self._read(self.paths[id(argument)])
            return self._read(self._constant(argument))
        return self._size(node.meta["example_value"])

    def _read(self, path: str) -> fx.Node:
        if path not in self.reads:
            self.reads[path] = self.graph.get_attr(path)
        return self.reads[path]

    def _constant(self, tensor: torch.Tensor) -> str:
        """The path of a tensor that is neither input, parameter nor buffer of the model."""
        for path, module in self.model.named_modules():
            for name, value in vars(module).items():
                if value is tensor:
                    return f"{path}.{name}".lstrip(".")
        raise TraceError(
            f"the model reads a tensor of shape {tuple(tensor.shape)} that is no attribute of a module; register it as a buffer."
        )

    def _size(self, symbol: torch.SymInt) -> fx.Node:
        """Read a symbolic size from the input that has it."""
        placeholders = self.found.graph_module.graph.find_nodes(op="placeholder")
        for node, argument in zip(placeholders, self.found.arguments, strict=True):
            shape = node.meta["example_value"].shape if isinstance(argument, torch.Tensor) else ()
            for dimension, size in enumerate(shape):
                if isinstance(size, torch.SymInt) and torch_internals.is_same_symbol(size, symbol) and id(argument) in self.leaves:
                    return self.graph.call_method("size", (self.inputs[self.leaves[id(argument)]], dimension))
        raise TraceError("the model computes with a number that is no size of an input; pass it as a constant.")

    def _copy(self, source: fx.GraphModule, values: dict[fx.Node, Any], around: tuple[Scope, ...]) -> Any:
        """Copy the nodes of a graph in which `values` stand for the placeholders; returns what stands for its results."""
        contexts: list[tuple[fx.Node | None, Scope]] = []  # what entered a scope, and the scope
        for node in source.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                return fx.node.map_arg(node.args[0], values.__getitem__)
            if torch_internals.changes_context(node):
                self._change_context(node, contexts)
            elif torch_internals.is_checkpoint(node):
                values[node] = self._copy_checkpoint(source, node, values, (*around, *(scope for _, scope in contexts)))
            elif node.op == "get_attr" and isinstance(attribute := getattr(source, str(node.target), None), fx.GraphModule):
                values[node] = attribute  # the body of a checkpoint
            elif node.op == "call_function" and node.target is operator.getitem and isinstance(values[node.args[0]], tuple):
                values[node] = values[node.args[0]][node.args[1]]
            elif node.op in ("call_function", "call_method"):
                values[node] = self._copy_node(node, values, (*around, *(scope for _, scope in contexts)))
            else:
                raise TraceError(f"Dynamo calls {node.target}, which a graph of modules and functions cannot hold.")
        raise AssertionError("a graph ends in an output")

    def _copy_node(self, node: fx.Node, values: dict[fx.Node, Any], scopes: tuple[Scope, ...]) -> fx.Node:
        made = self.graph.node_copy(node, values.__getitem__)
        stack = [(plain_path(path), kind) for path, kind in module_stack(node)]
        made.meta = {SCOPES: scopes, "nn_module_stack": {path: (path, kind) for path, kind in stack if path}}
        return made

    def _change_context(self, node: fx.Node, contexts: list[tuple[fx.Node | None, Scope]]) -> None:
        entered = torch_internals.entered_context(node)
        if entered is None:  # autocast is left; the node says which one
            contexts[:] = [context for context in contexts if context[0] is not node.args[0]]
        elif entered[0] == "autocast":
            contexts.append((node, Scope("autocast", next(self.idents), entered[1])))
        else:
            contexts[:] = [context for context in contexts if context[1].kind != "grad_mode"]
            if not dict(entered[1])["enabled"]:
                contexts.append((None, Scope("grad_mode", next(self.idents), entered[1])))

    def _copy_checkpoint(
        self, source: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any], around: tuple[Scope, ...]
    ) -> tuple[Any, ...]:
        arguments: list[Any] = [values[arg] if isinstance(arg, fx.Node) else arg for arg in node.args]
        body, *operands = arguments
        scope = Scope("checkpoint", next(self.idents), torch_internals.checkpoint_options_of_node(node))
        inner = dict(zip(body.graph.find_nodes(op="placeholder"), operands, strict=True))
        results = self._copy(body, inner, (*around, scope))
        return results if isinstance(results, tuple) else tuple(results)

    def _result(self, made: dict[int, Any], value: Any) -> Any:
        if id(value) in made:
            return made[id(value)]
        if isinstance(value, torch.Tensor):
            return self._read(self.paths[id(value)]) if id(value) in self.paths else self.inputs[self.leaves[id(value)]]
        return value

    def _call_layers(self) -> None:
        """Replace the functions that a plain layer of torch.nn calls by a call of the layer."""
        for path, nodes in _layer_runs(self.graph, self.model):
            inside = set(nodes)
            read = list(dict.fromkeys(o for n in nodes for o in n.all_input_nodes if o not in inside and o.op != "get_attr"))
            results = [n for n in nodes if any(user not in inside for user in n.users)]
            if len(read) != 1 or len(results) != 1 or len({n.meta[SCOPES] for n in nodes}) != 1:
                continue
            with self.graph.inserting_before(nodes[0]):
                call = self.graph.call_module(path, tuple(read))
            call.meta = dict(results[0].meta)
            results[0].replace_all_uses_with(call)
            for node in reversed(nodes):
                self.graph.erase_node(node)
        for node in self.graph.find_nodes(op="get_attr"):
            if not node.users:
                self.graph.erase_node(node)


def _layer_runs(graph: fx.Graph, model: nn.Module) -> Iterator[tuple[str, list[fx.Node]]]:
    """For each call of a plain layer of torch.nn without hooks, its path and its nodes."""
    calls = [node for node in graph.nodes if node.op in ("call_function", "call_method")]

    def key(node: fx.Node) -> tuple[str, ...]:
        return tuple(node.meta["nn_module_stack"])

    for stack, nodes in itertools.groupby(calls, key):
        if stack and (path := stack[-1].split("@")[0]) and _is_plain_layer(model, path):
            yield path, list(nodes)


def _is_plain_layer(model: nn.Module, path: str) -> bool:
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return False
    plain = type(module).__module__.startswith("torch.nn.modules") and not isinstance(module, THROUGH)
    return plain and next(module.children(), None) is None and not torch_internals.has_hooks(module)
