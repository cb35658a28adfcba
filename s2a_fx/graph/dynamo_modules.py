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
from s2a_fx.graph.calls import call_of, written_operand
from s2a_fx.graph.edit import free_path, replace_node
from s2a_fx.graph.flow import attribute
from s2a_fx.graph.provenance import module_stack, plain_path
from s2a_fx.graph.shapes import propagate

_STATE = re.compile(r"_(?:modules|parameters|buffers)_")
_CONVOLUTIONS = {torch.conv1d: nn.Conv1d, torch.conv2d: nn.Conv2d, torch.conv3d: nn.Conv3d}
_BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


class Unraisable(Exception):
    """Dynamo's graph does what the passes have no form for; the message says what."""


@dataclass(frozen=True)
class State:
    """What the arguments of Dynamo's graph are.

    Attributes:
        attributes: those that are the model's: (position, path of the attribute).
        inputs: those that are inputs of the raised graph: (position, the dimensions whose size may change).
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


def raised(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> tuple[fx.GraphModule, State]:
    """A copy of Dynamo's graph with attributes and modules, and how its arguments are bound to them.

    Raises:
        Unraisable: the graph does what the passes cannot see the order of, or takes a number that is no size of its inputs.
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
        if _written(node) is not None:
            _keep_write(gm, node)
        elif node.op == "call_function" and node.target in _RAISED:
            _RAISED[node.target](gm, node)
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
            if isinstance(size, torch.SymInt) and size.node.expr == symbol.node.expr:
                with gm.graph.inserting_after(placeholders[-1]):
                    read = gm.graph.call_method("size", (placeholder, dimension))
                number.replace_all_uses_with(read)
                gm.graph.erase_node(number)
                return
    raise Unraisable(f"{number.target} is a number that changes, and no size of an input")


def _check_writes(graph: fx.Graph) -> None:
    """Raise if anything but a whole tensor that nobody sees through another is written to in place: passes keep no other order."""
    seen_by: dict[int, set[fx.Node]] = {}
    for node in graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, torch.Tensor):
            seen_by.setdefault(torch_internals.storage_key(value), set()).add(node)
    writers = {node: written for node in graph.nodes if (written := _written(node)) is not None}
    for node, written in writers.items():
        value = written.meta["example_value"]
        others = seen_by.get(torch_internals.storage_key(value), set()) - {*writers, *writers.values()}
        ours = written.op == "placeholder" and not _STATE.search(str(written.target))
        if others or ours or torch_internals.is_view(value) or node.target is operator.setitem:
            raise Unraisable(f"{node.name} writes in place to what is read under another name")


def _written(node: fx.Node) -> Any:
    """The tensor node that a node writes to; None if it writes to none."""
    if node.op not in ("call_function", "call_method"):
        return None
    name = written_operand(node.target, node.args, node.kwargs)
    if name is None:
        return None
    call = call_of(nn.Module(), node)
    return node.args[0] if call is None else call.operands.get(name, node.args[0])


def _keep_write(gm: fx.GraphModule, node: fx.Node) -> None:
    """Let what reads a tensor after it was written to in place read the writer: a pass sees what depends on what, and no order.

    A write to one of the model's own tensors counts though nobody reads its result.
    """
    written = _written(node)
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

    _is_impure = True  # as torch.fx asks before it eliminates dead code

    def __init__(self, target: Any) -> None:
        super().__init__()
        self.target = target

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(args[0], self.target)(*args[1:], **kwargs) if isinstance(self.target, str) else self.target(*args, **kwargs)


def _raise_linear(gm: fx.GraphModule, node: fx.Node) -> None:
    x, weight, bias = _arguments(node, ("input", "weight", "bias"), (None,))
    if home := _home(weight=weight, bias=bias):
        made, taken = attribute(gm, f"{home}.weight").shape
        _call_layer(gm, node, x, home, nn.Linear(taken, made, bias is not None, device="meta"))


def _raise_convolution(gm: fx.GraphModule, node: fx.Node) -> None:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    x, weight, bias, stride, padding, dilation, groups = _arguments(node, names, (None, 1, 0, 1, 1))
    if home := _home(weight=weight, bias=bias):
        made, taken, *kernel = attribute(gm, f"{home}.weight").shape
        kind: Any = _CONVOLUTIONS[node.target]  # type: ignore[index]
        options = (stride, padding, dilation, groups, bias is not None)
        _call_layer(gm, node, x, home, kind(taken * groups, made, kernel, *options, device="meta"))


def _raise_batch_norm(gm: fx.GraphModule, node: fx.Node) -> None:
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    x, mean, var, weight, bias, training, momentum, eps = _arguments(node, names, (None, None, False, 0.1, 1e-5))
    home = _home(running_mean=mean, running_var=var, weight=weight, bias=bias)
    dimensions = node.meta["example_value"].ndim
    if not home or mean is None or not isinstance(momentum, float) or dimensions not in _BATCH_NORMS:
        return
    width = len(attribute(gm, f"{home}.running_mean"))
    layer = _BATCH_NORMS[dimensions](width, eps, momentum, affine=weight is not None, device="meta")
    counts = [n for n in gm.graph.find_nodes(op="get_attr", target=f"{home}.num_batches_tracked") if n < node]
    if _call_layer(gm, node, x, home, layer.train(training)) and counts and training:  # the module counts by itself
        for adding in list(counts[-1].users):
            gm.graph.erase_node(adding)
        gm.graph.erase_node(counts[-1])


def _raise_dropout(gm: fx.GraphModule, node: fx.Node) -> None:
    x, p, training, _ = _arguments(node, ("input", "p", "training", "inplace"), (0.5, True, False))
    if not p or not training:
        node.replace_all_uses_with(x)
        gm.graph.erase_node(node)
    else:
        replace_node(gm, node, nn.Dropout(p), (x,))


_RAISED: dict[Any, Any] = {
    F.linear: _raise_linear,
    F.batch_norm: _raise_batch_norm,
    F.dropout: _raise_dropout,
    **dict.fromkeys(_CONVOLUTIONS, _raise_convolution),
}
"""Function -> how a call of it becomes a call of a module."""


def _arguments(node: fx.Node, names: tuple[str, ...], defaults: tuple[Any, ...]) -> list[Any]:
    """The arguments of a call in the order of `names`; `defaults` are those of the last ones."""
    given = dict(zip(names[len(names) - len(defaults) :], defaults, strict=True))
    given |= dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return [given[name] for name in names]


def _home(**tensors: Any) -> str | None:
    """The module that owns the tensors under these names; None if there is no such module."""
    paths = {name: str(t.target) for name, t in tensors.items() if isinstance(t, fx.Node) and t.op == "get_attr"}
    home = next(iter(paths.values()), "").rpartition(".")[0]
    own = all(tensors[name] is None or paths.get(name) == f"{home}.{name}" for name in tensors)
    return home if own else None


def _call_layer(gm: fx.GraphModule, node: fx.Node, x: fx.Node, home: str, layer: nn.Module) -> bool:
    """Replace `node` by a call of `layer`, which takes the place of the plain module at `home` and its tensors.

    Returns:
        False, and nothing is changed, where a layer of other options, or a module with more than this layer has, stands there.
    """
    holder = gm.get_submodule(home)
    if type(holder) is nn.Module and next(holder.children(), None) is None and _tensors(holder) == _tensors(layer):
        for name, tensor in [*holder.named_parameters(recurse=False), *holder.named_buffers(recurse=False)]:
            torch_internals.put_tensor(layer, name, tensor)
        gm.set_submodule(home, layer)
    elif type(holder) is nn.Module or repr(holder) != repr(layer) or holder.training != layer.training:
        return False
    read = [n for n in node.all_input_nodes if n is not x]
    with gm.graph.inserting_before(node):
        call = gm.graph.call_module(home, (x,))
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    gm.graph.erase_node(node)
    for operand in read:
        gm.graph.erase_node(operand)
    return True


def _tensors(module: nn.Module) -> set[str]:
    """The names of a module's own tensors, but for a batch norm's counter, which Dynamo leaves out where nothing counts."""
    return {name for name, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]} - {
        "num_batches_tracked"
    }
