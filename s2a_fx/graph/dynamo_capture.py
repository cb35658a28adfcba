"""Capture a model's forward by Dynamo, for models that torch.fx cannot follow.

Dynamo's graph takes parameters and buffers as arguments and calls functions. It becomes a flat captured graph:

    Dynamo                                            here
    a call of `_run_leaf`                             call_module of a layer, the same layers that torch.fx leaves whole
    placeholder of a parameter or buffer              get_attr of the model's own path
    set_grad_enabled, enter_autocast, exit_autocast   scopes of the nodes between
    tag_activation_checkpoint(body, x)                the nodes of the body, in a checkpoint scope
    a symbolic size                                   x.size(0)
    the device of the fake tensors                    x.device
    MyFunction.apply(x)                               call_module of an `ApplyFunction`
"""

import contextvars
import copy
import functools
import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from s2a_fx.errors import TraceError
from s2a_fx.graph import torch_internals
from s2a_fx.graph.autograd_function import ApplyFunction
from s2a_fx.graph.edit import free_path, snake_case
from s2a_fx.graph.fake import fake_copy, fake_mode, fake_tensor
from s2a_fx.graph.fx_capture import Captured, is_leaf, is_same_constant
from s2a_fx.graph.inputs import Signature, Structure
from s2a_fx.graph.provenance import module_stack, plain_path
from s2a_fx.graph.regions import SCOPES, Scope
from s2a_fx.graph.torch_internals import FAKE_DEVICE, CompilerAnswers, DynamoGraph, FakeTensorMode, Marker, tree_leaves, tree_map

_LEAVES: contextvars.ContextVar[Sequence[nn.Module]] = contextvars.ContextVar("leaves")


def capture_by_dynamo(model: nn.Module, signature: Signature, inputs: Sequence[torch.Tensor]) -> Captured:
    """Capture `model` in the mode in which it stands.

    Args:
        model: a private copy; its modules become those of the graph.
        signature: how the model is called.
        inputs: the example's tensors.

    Raises:
        TraceError: Dynamo cannot follow the model as one graph; names the module and the line.
    """
    mode = fake_mode()
    fakes = _FakeCopy(model, mode)
    leaves = [fake_tensor(t, mode) for t in inputs]
    args, kwargs = signature.arguments(leaves)
    token = _LEAVES.set(fakes.leaves)
    try:
        with mode:
            found = _graph_of(fakes.model, args, kwargs, leaves)
    except Exception as error:
        raise TraceError(_refusal(model, error)) from error
    finally:
        _LEAVES.reset(token)
    results, structure = Structure.of(found.result(args, kwargs))
    larger = [_with_larger_batch(leaf, mode) for leaf in leaves]
    others = Structure.of(found.result(*signature.arguments(larger)))[0]
    graph = _Rebuilder(model, fakes, found, leaves, signature.names).build(results, others)
    return Captured(graph, structure, (len(leaves[0]) + 1, *found.doubtful_sizes) if leaves and leaves[0].ndim else ())


def _graph_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: Sequence[torch.Tensor]) -> DynamoGraph:
    """Dynamo's graph of a fake model.

    If Dynamo cannot follow the forward as Python runs it, it need not follow what a first call alone does, such as to install
    hooks, and the forward may take the way that its author wrote for compilers: near where Dynamo stopped, and only there.
    """
    answers = CompilerAnswers()
    for attempt in itertools.count():
        try:
            return torch_internals.dynamo_graph(model, args, kwargs, leaves, _run_leaf, answers)
        except Exception as refusal:
            if not answers.say_compiling_around(refusal) and attempt:
                raise
            if not attempt and not _first_call_ends(model, args, kwargs):
                raise
    raise AssertionError("the attempts end when nobody is left to answer otherwise")


def _first_call_ends(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Do what a first call alone does; returns whether it came to its end."""
    try:
        model(*args, **kwargs)
    except Exception:
        return False
    return True


def _with_larger_batch(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    return fake_tensor(tensor, mode, len(tensor) + 1) if tensor.ndim else tensor


class _FakeCopy:
    """A copy of a model on fake tensors, for Dynamo: a layer that stays whole calls `_run_leaf`.

    Attributes:
        model: the copy.
        leaves: the original layers, in the order of the numbers that `_run_leaf` is called with.
        leaf_paths: their paths.
        originals: id of a tensor of the copy -> the model's own tensor.
    """

    def __init__(self, model: nn.Module, mode: FakeTensorMode) -> None:
        memo = _fake_tensors(model, mode)
        self.originals = {id(memo[id(t)]): t for t in _tensors(model)}
        self.model = copy.deepcopy(model, memo)
        self.alive = list(memo.values())  # a tensor that dies would give its id to another
        found = [(path, m) for path, m in model.named_modules() if path and is_leaf(m)]
        self.leaf_paths = [path for path, _ in found]
        self.leaves = [module for _, module in found]
        for index, path in enumerate(self.leaf_paths):
            leaf = self.model.get_submodule(path)
            torch_internals.remove_hooks(leaf)  # they run when the graph calls the layer
            leaf.__dict__["forward"] = functools.partial(_run_leaf, index)


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    """The tensors of a module and of those inside it: parameters, buffers, and what plain attributes hold."""
    plain = [leaf for m in module.modules() for leaf in tree_leaves(_plain_attributes(m)) if isinstance(leaf, torch.Tensor)]
    return [*module.parameters(), *module.buffers(), *plain]


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if isinstance(value, torch.Tensor | list | tuple | dict)}


def _fake_tensors(module: nn.Module, mode: FakeTensorMode) -> dict[int, Any]:
    """What deepcopy is to put in the place of each tensor."""
    return {id(t): fake_tensor(t, mode) for t in _tensors(module)}


def _run_leaf(index: int, *args: Any, **kwargs: Any) -> Any:
    """What a layer computes; Dynamo writes this call down, and does not look inside."""
    leaf, mode = _LEAVES.get()[index], torch_internals.present_fake_mode()
    return fake_copy(leaf, _fake_tensors(leaf, mode))(*args, **kwargs)


def _refusal(model: nn.Module, error: Exception) -> str:
    """The module and the source line in which Dynamo stopped, and why."""
    reason, stack = torch_internals.dynamo_refusal(error)
    if not stack:
        return f"the model itself ({type(model).__name__}): Dynamo cannot follow it ({reason})"
    found = [("", model)]
    for frame in stack:
        inside = [(f"{path}.{name}".strip("."), m) for path, owner in found for name, m in owner.named_modules()]
        found = [(path, m) for path, m in inside if _is_line_of(m, frame.filename, frame.lineno)] or found
    path, module = found[0]
    place = f"{path or 'the model itself'} ({type(module).__name__}), line {stack[-1].lineno} of {stack[-1].filename}"
    return f"{place}: Dynamo cannot follow it ({reason})"


def _is_line_of(module: nn.Module, filename: str, line: int | None) -> bool:
    """Whether a source line is in a module's forward."""
    code = getattr(module.forward, "__code__", None)
    if code is None or line is None or code.co_filename != filename:
        return False
    return code.co_firstlineno <= line <= max(end for *_, end in code.co_lines() if end is not None)


class _Rebuilder:
    """Copies Dynamo's graph, node by node, into one over the model's own modules and tensors."""

    def __init__(
        self,
        model: nn.Module,
        fakes: _FakeCopy,
        found: DynamoGraph,
        leaves: Sequence[torch.Tensor],
        names: Sequence[str],
    ) -> None:
        self.model, self.fakes, self.found = model, fakes, found
        self.modules = {p: module for p, module in model.named_modules(remove_duplicate=False) if p}
        self.paths = {id(t): path for path, t in [*model.named_parameters(), *model.named_buffers()]}
        self.fakes_of_inputs = leaves
        self.leaves = {id(t): index for index, t in enumerate(leaves)}
        self.graph = fx.Graph()
        self.inputs = [self.graph.placeholder(name) for name in names]
        self.reads: dict[str, fx.Node] = {}
        self.symbols = self._symbols()
        self.sizes: dict[tuple[int, int], fx.Node] = {}
        self.device: fx.Node | None = None
        self.idents = itertools.count()

    def build(self, results: Sequence[Any], others: Sequence[Any]) -> fx.Graph:
        """The graph, which returns `results`, and for another batch size `others`."""
        source = self.found.graph_module
        placeholders = source.graph.find_nodes(op="placeholder")
        arguments = zip(placeholders, self.found.arguments, strict=True)
        values = {node: self._argument(node, argument) for node, argument in arguments}
        outputs = self._copy(source, values, ())
        self.graph.output(tuple(self._result(outputs, *pair) for pair in zip(results, others, strict=True)))
        return self.graph

    def _argument(self, node: fx.Node, argument: Any) -> Any:
        if not isinstance(argument, torch.Tensor):
            size = self._size(node.meta["example_value"])
            if size is None:
                place = self._place(next(iter(node.users)))
                raise TraceError(f"{place}: computes with a number that is no size of an input; pass it as a constant.")
            return size
        if id(argument) in self.leaves:
            return self.inputs[self.leaves[id(argument)]]
        return self._read(self.fakes.originals.get(id(argument), argument))

    def _read(self, tensor: torch.Tensor) -> fx.Node:
        """The node that reads one of the model's tensors, or a constant."""
        path = self.paths.get(id(tensor)) or self._constant(tensor)
        if path not in self.reads:
            with self.graph.inserting_after((self.inputs or [torch_internals.root_of(self.graph)])[-1]):
                self.reads[path] = self.graph.get_attr(path)
        return self.reads[path]

    def _constant(self, tensor: torch.Tensor) -> str:
        """The path of a tensor that is neither parameter nor buffer; equal constants of the captures of both modes are one."""
        if tensor.requires_grad:
            raise TraceError(
                f"the model itself ({type(self.model).__name__}): reads a tensor of shape {tuple(tensor.shape)} that needs a "
                "gradient, and is no parameter of the model; assign it, or the module that holds it, to an attribute."
            )
        for path, module in self.model.named_modules():
            for name, value in vars(module).items():
                if value is tensor or (not path and isinstance(value, torch.Tensor) and is_same_constant(value, tensor)):
                    return f"{path}.{name}".lstrip(".")
        index = next(i for i in itertools.count() if not hasattr(self.model, f"_tensor_constant{i}"))
        setattr(self.model, f"_tensor_constant{index}", tensor)
        return f"_tensor_constant{index}"

    def _size(self, size: Any) -> Any:
        """The size of an input, read from it, or the number; None for what is computed from sizes."""
        if not isinstance(size, torch.SymInt):
            return size
        for key, symbol in self.symbols.items():
            if torch_internals.is_same_symbol(size, symbol):
                return self._read_size(*key)
        return None

    def _read_size(self, index: int, dimension: int) -> fx.Node:
        if (index, dimension) not in self.sizes:
            with self.graph.inserting_after(self.inputs[-1]):
                self.sizes[index, dimension] = self.graph.call_method("size", (self.inputs[index], dimension))
        return self.sizes[index, dimension]

    def _located(self, argument: Any) -> Any:
        """An argument of a call; a device that the model read from a tensor is read again, wherever the model is moved."""
        if not isinstance(argument, torch.device) or argument != FAKE_DEVICE or not self.inputs:
            return argument
        if self.device is None:
            floats = (node for node, leaf in zip(self.inputs, self.fakes_of_inputs, strict=True) if leaf.is_floating_point())
            with self.graph.inserting_after(self.inputs[-1]):
                self.device = self.graph.call_function(getattr, (next(floats, self.inputs[0]), "device"))
        return self.device

    def _symbols(self) -> dict[tuple[int, int], torch.SymInt]:
        """The sizes of the inputs that may change, by the input's number and the dimension."""
        placeholders = self.found.graph_module.graph.find_nodes(op="placeholder")
        found = {}
        for node, argument in zip(placeholders, self.found.arguments, strict=True):
            for dimension, size in enumerate(node.meta["example_value"].shape if id(argument) in self.leaves else ()):
                if isinstance(size, torch.SymInt):
                    found[self.leaves[id(argument)], dimension] = size
        return found

    def _stack(self, node: fx.Node) -> dict[str, Any]:
        """The modules around a node of Dynamo's, outermost first: path in the model -> type."""
        stack = {plain_path(torch_internals.of_self(path, self.found)): kind for path, kind in module_stack(node)}
        return {path: kind for path, kind in stack.items() if path in self.modules}

    def _place(self, node: fx.Node) -> str:
        """The module and the source line of a node of Dynamo's."""
        path = next(reversed(self._stack(node)), "")
        module = self.model.get_submodule(path)
        lines = torch_internals.source_lines(node)
        line = f", line {lines[-1].lineno} of {lines[-1].filename}" if lines else ""
        return f"{path or 'the model itself'} ({type(module).__name__}){line}"

    def _copy(self, source: fx.GraphModule, values: dict[fx.Node, Any], around: tuple[Scope, ...]) -> tuple[Any, ...]:
        """Copy the nodes of a graph in which `values` stand for the placeholders; returns what stands for its results."""
        contexts: list[tuple[fx.Node | None, Scope]] = []  # what entered a scope, and the scope
        for node in source.graph.nodes:
            scopes = (*around, *(scope for _, scope in contexts))
            if node.op == "placeholder":
                continue
            if node.op == "output":
                results: Any = fx.node.map_arg(node.args[0], values.__getitem__)
                return tuple(results) if isinstance(results, tuple | list) else (results,)
            if torch_internals.changes_context(node):
                self._change_context(node, contexts)
            elif torch_internals.is_checkpoint(node):
                values[node] = self._copy_checkpoint(node, values, scopes)
            elif node.op == "get_attr":
                values[node] = getattr(source, str(node.target))  # the body of a checkpoint
            elif node.op == "call_function" and node.target is operator.getitem and isinstance(values[node.args[0]], tuple):
                values[node] = values[node.args[0]][node.args[1]]
            elif (sizes := self._known_sizes(node)) is not None:
                values[node] = sizes
            else:
                values[node] = self._copy_node(node, values, scopes)
        raise AssertionError("a graph ends in an output")

    def _known_sizes(self, node: fx.Node) -> Any:
        """What stands for a node that reads a shape, or a size, which an input has too; None for any other node."""
        value = node.meta.get("example_value")
        if isinstance(value, torch.Size):
            sizes = tuple(map(self._size, value))
            return None if None in sizes else sizes
        return self._size(value) if isinstance(value, torch.SymInt | int) and not isinstance(value, bool) else None

    def _copy_node(self, node: fx.Node, values: Mapping[fx.Node, Any], scopes: tuple[Scope, ...]) -> fx.Node:
        arguments: Any = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        args, kwargs = tree_map(self._located, arguments)
        op, target, stack = node.op, node.target, self._stack(node)
        if target is _run_leaf:
            op, (index, *args) = "call_module", args
            target, leaf = self.fakes.leaf_paths[index], self.fakes.leaves[index]
            stack = {p: kind for p, kind in stack.items() if self.modules[p] is not leaf} | {target: type(leaf)}
        elif function := torch_internals.applied_function(node):
            op, target = "call_module", self._function_module(function)
            stack[target] = ApplyFunction
        else:
            self._check_call(node, args, kwargs)
        name = node.name if op == node.op else None  # torch.fx names the call of a module for its path
        made = self.graph.create_node(op, target, tuple(args), kwargs, name)  # type: ignore[arg-type]
        made.meta = {SCOPES: scopes, "nn_module_stack": {path: (path, kind) for path, kind in stack.items()}}
        return made

    def _check_call(self, node: fx.Node, args: Any, kwargs: Any) -> None:
        """Raise if a node is more than a call that depends on its operands alone, or reads a value."""
        if torch_internals.reads_value(node):
            raise TraceError(f"{self._place(node)}: reads the value of a tensor, or makes a shape of it; rewrite it without.")
        is_statement = "example_value" not in node.meta and node.target is not operator.setitem
        if is_statement or any(isinstance(v, fx.GraphModule) for v in tree_leaves((args, kwargs))):
            name = getattr(node.target, "__name__", node.target)
            raise TraceError(f"{self._place(node)}: calls {name}, for which a graph has no node; rewrite it without.")

    def _function_module(self, function: type[torch.autograd.Function]) -> str:
        """The path of the module that applies a function."""
        for path, module in self.model.named_children():
            if isinstance(module, ApplyFunction) and module.function is function:
                return path
        path = free_path(self.model, "", snake_case(function))
        self.model.add_module(path, ApplyFunction(function))
        return path

    def _change_context(self, node: fx.Node, contexts: list[tuple[fx.Node | None, Scope]]) -> None:
        entered = torch_internals.entered_context(node)
        if entered is None:  # a context is left; the node says which one
            contexts[:] = [context for context in contexts if context[0] is not node.args[0]]
            return
        kind, options = entered
        if kind == "autocast" and dict(options)["device_type"] == FAKE_DEVICE.type:
            options = tuple({**dict(options), "device_type": None}.items())
        if not torch_internals.sets_grad_mode(node):
            contexts.append((node, Scope(kind, next(self.idents), options)))
            return
        contexts[:] = [context for context in contexts if context[0] is not None]
        if not dict(options)["enabled"]:
            contexts.append((None, Scope(kind, next(self.idents), options)))

    def _copy_checkpoint(self, node: fx.Node, values: Mapping[fx.Node, Any], around: tuple[Scope, ...]) -> tuple[Any, ...]:
        arguments: list[Any] = [values[arg] if isinstance(arg, fx.Node) else arg for arg in node.args]
        body, *operands = arguments
        scope = Scope("checkpoint", next(self.idents), torch_internals.checkpoint_options_of_node(node))
        inner = dict(zip(body.graph.find_nodes(op="placeholder"), operands, strict=True))
        return self._copy(body, inner, (*around, scope))

    def _result(self, outputs: Sequence[Any], value: Any, other: Any) -> Any:
        if isinstance(value, Marker):
            return outputs[value.index]
        if isinstance(value, torch.Tensor):
            if id(value) in self.leaves:
                return self.inputs[self.leaves[id(value)]]
            return self._read(self.fakes.originals.get(id(value), value))
        if type(value) is type(other) and value == other:
            return value
        for leaf, node in zip(self.fakes_of_inputs, self.inputs, strict=True):
            if leaf.ndim and (value, other) == (len(leaf), len(leaf) + 1):
                return self._read_size(self.inputs.index(node), 0)
        raise TraceError(
            f"the model itself ({type(self.model).__name__}): returns {value!r}, which depends on the batch size; return tensors."
        )
