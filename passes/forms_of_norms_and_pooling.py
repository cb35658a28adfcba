"""How `CompressActivations` finds and replaces batch norm and max pooling.

    before  BatchNorm2d                  keeps x, 32 bits                after  CodedBatchNorm   8 bits, or nothing
    before  BatchNormAct2d (timm)        keeps x and f's, 32 bits        after  CodedBatchNorm, then its drop and activation
    before  MaxPool2d                    keeps x and int64 indices       after  CodedMaxPool     4 bits an output (3 by 3)

A batch norm's coded form stands under its path, so that no parameter or buffer is renamed.

Leaves alone: subclasses of these layers, which may do more; windows of more than 256 places; pooling that returns its indices.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import fx, nn

from s2a_fx.analysis.provenance import module_stack
from s2a_fx.nn.coded_norms import BATCH_NORMS, CodedBatchNorm, CodedMaxPool, pair, taking_over
from s2a_fx.ops.max_pool import LARGEST
from s2a_fx.passes.base import replaced

_POOLINGS = (F.max_pool2d, torch.max_pool2d)


def open_norm_activations(gm: fx.GraphModule) -> bool:
    """Make a leaf that normalizes and activates three nodes: the batch norm, its drop, its activation; whether there was one."""
    leaves = [node for node in gm.graph.nodes if node.op == "call_module" and _is_norm_activation(gm, node)]
    for node in leaves:
        norm: Any = gm.get_submodule(str(node.target))
        around = module_stack(node)
        if isinstance(norm, BatchNormAct2d):  # a module that is called twice is opened once
            _put(gm, node, taking_over(norm, nn.BatchNorm2d))
        value, last = node.meta["val"], node
        for name in ("drop", "act"):
            layer = getattr(norm, name)
            if isinstance(layer, nn.Identity):
                continue
            path = f"{node.target}.{name}"
            with gm.graph.inserting_after(last):
                following = gm.graph.call_module(path, (last,))
            last.replace_all_uses_with(following, delete_user_cb=lambda user, new=following: user is not new)
            following.meta["val"] = value
            following.meta["nn_module_stack"] = {place: (place, kind) for place, kind in [*around, (path, type(layer))]}
            last = following
    return bool(leaves)


def _is_norm_activation(gm: fx.GraphModule, node: fx.Node) -> bool:
    return type(gm.get_submodule(str(node.target))) is BatchNormAct2d


def serves_batch_norm(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is a plain batch norm."""
    return node.op == "call_module" and type(gm.get_submodule(str(node.target))) in BATCH_NORMS


def replace_batch_norm(gm: fx.GraphModule, node: fx.Node, bits: int) -> None:
    """Put the coded form in the module's place; the graph stays as it is."""
    norm: Any = gm.get_submodule(str(node.target))
    if not isinstance(norm, CodedBatchNorm):  # a module that is called twice is replaced once
        _put(gm, node, CodedBatchNorm.of(norm, bits))


def _put(gm: fx.GraphModule, node: fx.Node, module: nn.Module) -> None:
    """Put `module` wherever the module that `node` calls is registered."""
    old = gm.get_submodule(str(node.target))
    for path in [path for path, present in gm.named_modules(remove_duplicate=False) if present is old]:
        gm.set_submodule(path, module)
        for n in gm.graph.nodes:
            if path in n.meta.get("nn_module_stack", {}):
                n.meta["nn_module_stack"] = {**n.meta["nn_module_stack"], path: (path, type(module))}


def serves_max_pool(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is max pooling of (N, C, H, W), however it is spelled."""
    return max_pooling(gm, node) is not None


def replace_max_pool(gm: fx.GraphModule, node: fx.Node, bits: int) -> None:
    """Replace the pooling by its coded form; the bits follow from the window."""
    module = max_pooling(gm, node)
    assert module is not None
    replaced(gm, node, module, (node.all_input_nodes[0],))


def max_pooling(gm: fx.GraphModule, node: fx.Node) -> CodedMaxPool | None:
    """The coded form of the max pooling that a node computes; None for any other node."""
    if node.op == "call_module":
        pool = gm.get_submodule(str(node.target))
        if type(pool) is not nn.MaxPool2d:
            return None
        options = [pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode, pool.return_indices]
    elif node.op == "call_function" and node.target in _POOLINGS:
        names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
        given: dict[str, Any] = {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False}
        given |= dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        options = [given[name] for name in names[1:]]
    else:
        return None
    value = node.meta.get("val")
    if len(node.all_input_nodes) != 1 or options[-1] or not isinstance(value, torch.Tensor) or value.ndim != 4:
        return None
    kernel, stride, *others, ceil_mode, _ = options
    rows, columns = pair(kernel)
    if rows * columns > LARGEST:
        return None
    strides, padding, dilation = (tuple(pair(option)) for option in (stride or kernel, *others))
    return CodedMaxPool((rows, columns), strides, padding, dilation, ceil_mode=ceil_mode)  # type: ignore[arg-type]
