"""Dynamo's graph as the passes know graphs.

    Dynamo hands over                                        the passes take
    parameters and buffers as placeholders                   attributes, under the model's own paths
    linear(x, w, b), conv2d, batch_norm, dropout             calls of nn.Linear, nn.Conv2d, nn.BatchNorm2d, nn.Dropout
    a dropout that drops nothing                             nothing
    example values, some of them symbolic                    fake tensors of the example's size

`State` remembers which of the arguments became attributes, and binds those of each call.
"""

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from s2a_fx.graph import torch_internals
from s2a_fx.graph.calls import Call, call_of, written_value
from s2a_fx.graph.edit import free_path, replace_node
from s2a_fx.graph.flow import attribute
from s2a_fx.graph.provenance import module_stack, plain_path
from s2a_fx.graph.shapes import propagate
from s2a_fx.graph.spellings import value_of

_STATE = re.compile(r"_(?:modules|parameters|buffers)_")
_CONVOLUTIONS: dict[Any, Any] = {F.conv1d: nn.Conv1d, F.conv2d: nn.Conv2d, F.conv3d: nn.Conv3d}
_BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


class UnsupportedGraph(Exception):
    """Dynamo's graph does what the passes have no form for; the message says what."""


@dataclass(frozen=True)
class State:
    """What the arguments of Dynamo's graph are.

    Attributes:
        attributes: those that are the model's: (position, path of the attribute).
        inputs: those that are inputs of the graph: (position, the dimensions whose size may change).
    """

    attributes: tuple[tuple[int, str], ...]
    inputs: tuple[tuple[int, tuple[int, ...]], ...]

    def bind(self, gm: fx.GraphModule, arguments: Sequence[Any]) -> list[torch.Tensor]:
        """Make the model's tensors among `arguments` the attributes of `gm`; returns the inputs."""
        for position, path in self.attributes:
            owner, _, name = path.rpartition(".")
            module = gm.get_submodule(owner)
            if getattr(module, name) is not arguments[position]:
                torch_internals.put_tensor(module, name, arguments[position])
        return [_with_dynamic(arguments[position], dimensions) for position, dimensions in self.inputs]


def to_modules(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> tuple[fx.GraphModule, State]:
    """A copy of Dynamo's graph with attributes and modules, and how its arguments are bound to them.

    Raises:
        UnsupportedGraph: the graph does what the passes cannot see the order of, or takes a number that is no size of its inputs.
    """
    _check_writes(graph_module.graph)
    root = nn.Module()
    for name, child in graph_module.named_children():
        root.add_module(name, child)
    gm = fx.GraphModule(root, _copied(graph_module.graph))
    gm.train()
    attributes: list[tuple[int, str]] = []
    inputs: list[tuple[int, tuple[int, ...]]] = []
    examples = []
    placeholders = gm.graph.find_nodes(op="placeholder")
    for position, (node, example) in enumerate(zip(placeholders, example_inputs, strict=True)):
        path = _path(str(node.target), example, {path for _, path in attributes})
        if isinstance(example, torch.SymInt):
            _read_size(gm, node, placeholders)
        elif path is not None:
            _register(gm, path, example)
            _read_attribute(gm, node, path)
            attributes.append((position, path))
        else:
            sizes = node.meta["example_value"].shape
            inputs.append((position, tuple(d for d, size in enumerate(sizes) if isinstance(size, torch.SymInt))))
            examples.append(example)
    for node in list(gm.graph.nodes):
        node.meta["val"] = node.meta.get("example_value")
        stack = module_stack(node)
        if stack:
            node.meta["nn_module_stack"] = {plain_path(p): (plain_path(p), kind) for p, kind in stack}
        if written_value(node) is not None:
            _keep_write(gm, node)
        elif (call := call_of(gm, node)) is not None and node.op != "call_module" and call.operator in _AS_MODULE:
            _AS_MODULE[call.operator](gm, call)
    gm.recompile()
    propagate(gm, examples)
    return gm, State(tuple(attributes), tuple(inputs))


def _with_dynamic(tensor: Any, dimensions: tuple[int, ...]) -> Any:
    """The tensor, or a view of it that says which sizes may change: a mark on the user's own would be a new tensor to Dynamo."""
    if dimensions:
        tensor = tensor.view_as(tensor)
    for dimension in dimensions:
        torch_internals.mark_dynamic(tensor, dimension)
    return tensor


def _copied(graph: fx.Graph) -> fx.Graph:
    copy = fx.Graph()
    output = copy.graph_copy(graph, {})
    copy.output(output)
    return copy


def _path(target: str, example: Any, taken: set[str]) -> str | None:
    """`L_self_modules_norm_parameters_weight_` -> `norm.weight`, below its owner if taken; None for what is not the model's."""
    if not isinstance(example, torch.Tensor):
        return None
    owner, *names = _STATE.split(target.removesuffix("_"))
    if names:
        path = ".".join(names)
        return f"{owner}.{path}" if path in taken else path
    return re.sub(r"\W", "_", target) if isinstance(example, nn.Parameter) else None


def _register(gm: fx.GraphModule, path: str, tensor: torch.Tensor) -> None:
    owner_path, _, name = path.rpartition(".")
    owner: nn.Module = gm
    for part in owner_path.split(".") if owner_path else ():
        if part not in dict(owner.named_children()):
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(name, tensor)
    else:
        owner.register_buffer(name, tensor)


def _read_attribute(gm: fx.GraphModule, placeholder: fx.Node, path: str) -> None:
    """Read the attribute wherever the placeholder was read: a node for each reader, as a trace has."""
    for user in list(placeholder.users):
        with gm.graph.inserting_before(user):
            user.replace_input_with(placeholder, gm.graph.get_attr(path))
    gm.graph.erase_node(placeholder)


def _read_size(gm: fx.GraphModule, number: fx.Node, placeholders: list[fx.Node]) -> None:
    """Read a symbolic size from the input that has it, in the place of an argument of its own."""
    symbol = number.meta["example_value"]
    for placeholder in placeholders:
        value = placeholder.meta["example_value"]
        for dimension, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            if isinstance(size, torch.SymInt) and torch_internals.is_same_symbol(size, symbol):
                with gm.graph.inserting_after(placeholders[-1]):
                    read = gm.graph.call_method("size", (placeholder, dimension))
                number.replace_all_uses_with(read)
                gm.graph.erase_node(number)
                return
    raise UnsupportedGraph(f"{number.target} is a number that changes, and no size of an input")


def _check_writes(graph: fx.Graph) -> None:
    """Raise unless each write in place is to a whole tensor that has no views: passes keep no other order of writes."""
    seen_by: dict[int, set[fx.Node]] = {}
    for node in graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, torch.Tensor):
            seen_by.setdefault(torch_internals.storage_key(value), set()).add(node)
    writers = {node: written for node in graph.nodes if (written := written_value(node)) is not None}
    if several := [node for node, written in writers.items() if not isinstance(written, fx.Node)]:
        raise UnsupportedGraph(f"{several[0].name} writes in place to several tensors at once")
    for node, written in writers.items():
        value = written.meta["example_value"]
        others = seen_by.get(torch_internals.storage_key(value), set()) - {*writers, *writers.values()}
        ours = written.op == "placeholder" and not _STATE.search(str(written.target))
        if others or ours or torch_internals.is_view(value) or node.target is operator.setitem:
            raise UnsupportedGraph(f"{node.name} writes in place to what is read under another name")


def _keep_write(gm: fx.GraphModule, node: fx.Node) -> None:
    """Let what reads a tensor after it was written to in place read the writer: a pass sees what depends on what, and no order.

    A write to one of the model's own tensors counts though nobody reads its result.
    """
    written = written_value(node)
    if _is_own(gm, written):
        kwargs = node.kwargs
        replace_node(gm, node, _InPlace(node.target), tuple(node.args), free_path(gm, "", "in_place")).kwargs = kwargs
    else:
        written.replace_all_uses_with(node, delete_user_cb=lambda user: user > node)


def _is_own(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is one of the model's tensors, or what a write to one returned."""
    return node.op == "get_attr" or (node.op == "call_module" and isinstance(gm.get_submodule(str(node.target)), _InPlace))


class _InPlace(nn.Module):
    """An in-place method or function, called on one of the model's own tensors."""

    def __init__(self, target: Any) -> None:
        super().__init__()
        self.target = target
        torch_internals.keep_call(self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(args[0], self.target)(*args[1:], **kwargs) if isinstance(self.target, str) else self.target(*args, **kwargs)


def _make_linear(gm: fx.GraphModule, call: Call) -> None:
    if home := _home(call, "weight", "bias"):
        made, taken = attribute(gm, f"{home}.weight").shape
        _call_layer(gm, call, home, nn.Linear(taken, made, "bias" in call.operands, device="meta"))


def _make_convolution(gm: fx.GraphModule, call: Call) -> None:
    if home := _home(call, "weight", "bias"):
        made, taken, *kernel = attribute(gm, f"{home}.weight").shape
        stride, padding, dilation, groups = (call.options[name] for name in ("stride", "padding", "dilation", "groups"))
        options = (stride, padding, dilation, groups, "bias" in call.operands)
        _call_layer(gm, call, home, _CONVOLUTIONS[call.operator](taken * groups, made, kernel, *options, device="meta"))


def _make_batch_norm(gm: fx.GraphModule, call: Call) -> None:
    home = _home(call, "running_mean", "running_var", "weight", "bias")
    dimensions, momentum, training = value_of(call.node).ndim, call.options["momentum"], call.options["training"]
    if not home or "running_mean" not in call.operands or not isinstance(momentum, float) or dimensions not in _BATCH_NORMS:
        return
    width, affine = len(attribute(gm, f"{home}.running_mean")), "weight" in call.operands
    layer = _BATCH_NORMS[dimensions](width, call.options["eps"], momentum, affine=affine, device="meta")
    counts = [n for n in gm.graph.find_nodes(op="get_attr", target=f"{home}.num_batches_tracked") if n < call.node]
    if _call_layer(gm, call, home, layer.train(training)) and counts and training:  # the module counts by itself
        for adding in list(counts[-1].users):
            gm.graph.erase_node(adding)
        gm.graph.erase_node(counts[-1])


def _make_dropout(gm: fx.GraphModule, call: Call) -> None:
    if not call.draws:
        call.node.replace_all_uses_with(call.input)
        gm.graph.erase_node(call.node)
    else:
        replace_node(gm, call.node, nn.Dropout(call.options["p"]), (call.input,))


_AS_MODULE: dict[Any, Any] = {
    F.linear: _make_linear,
    F.batch_norm: _make_batch_norm,
    F.dropout: _make_dropout,
    **dict.fromkeys(_CONVOLUTIONS, _make_convolution),
}
"""Operator -> how a call of it becomes a call of a module."""


def _home(call: Call, *names: str) -> str | None:
    """The module that owns a call's operands of these names; None if there is no such module."""
    paths = {name: call.path_of(name) for name in names if name in call.operands}
    home = (next(iter(paths.values()), None) or "").rpartition(".")[0]
    return home if all(path == f"{home}.{name}" for name, path in paths.items()) else None


def _call_layer(gm: fx.GraphModule, call: Call, home: str, layer: nn.Module) -> bool:
    """Replace a call by one of `layer`, which takes the place of the plain module at `home` and its tensors.

    Returns:
        False, and nothing is changed, where a layer of other options, or a module with more than this layer has, stands there.
    """
    holder, node = gm.get_submodule(home), call.node
    if type(holder) is nn.Module and next(holder.children(), None) is None and _tensors(holder) == _tensors(layer):
        for name, held in [*holder.named_parameters(recurse=False), *holder.named_buffers(recurse=False)]:
            torch_internals.put_tensor(layer, name, held)
        gm.set_submodule(home, layer)
    elif type(holder) is nn.Module or repr(holder) != repr(layer) or holder.training != layer.training:
        return False
    read = [n for n in node.all_input_nodes if n is not call.input]
    with gm.graph.inserting_before(node):
        made = gm.graph.call_module(home, (call.input,))
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    gm.graph.erase_node(node)
    for tensor in read:
        gm.graph.erase_node(tensor)
    return True


def _tensors(module: nn.Module) -> set[str]:
    """The names of a module's own tensors, but for a batch norm's counter, which Dynamo leaves out where nothing counts."""
    return {name for name, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]} - {
        "num_batches_tracked"
    }
