"""Frozen convolutions and max pooling.

    before  Conv2d, its weight frozen    keeps x, 32 bits                after  FrozenConvolution   nothing, exact
    before  MaxPool2d                    keeps x and int64 indices       after  CodedMaxPool        4 bits an output (3 by 3), exact

Leaves alone: subclasses of these layers, which may do more; windows of more than 256 places; pooling that returns its indices.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from s2a_fx.graph.calls import call_of
from s2a_fx.graph.edit import replace_node
from s2a_fx.nn.coded import FrozenConvolution
from s2a_fx.nn.coded_norms import CodedMaxPool
from s2a_fx.nn.ghost import can_be_ghost
from s2a_fx.ops.max_pool import LARGEST


def serves_frozen_convolution(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is a plain convolution whose weight is frozen."""
    module = _convolution(gm, node)
    return module is not None and not module.weight.requires_grad


def replace_frozen_convolution(gm: fx.GraphModule, node: fx.Node, bits: int) -> None:
    """Replace the convolution by the form that keeps nothing; weight and bias stay where they are registered."""
    module = _convolution(gm, node)
    with gm.graph.inserting_before(node):
        weight = gm.graph.get_attr(f"{node.target}.weight")
        bias = None if module.bias is None else gm.graph.get_attr(f"{node.target}.bias")
    frozen = FrozenConvolution(module.stride, module.padding, module.dilation, module.groups)
    replace_node(gm, node, frozen, (node.all_input_nodes[0], weight, bias))


def _convolution(gm: fx.GraphModule, node: fx.Node) -> Any:
    module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
    return module if can_be_ghost(module) and not isinstance(module, nn.Linear) else None


def serves_max_pool(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is max pooling of (N, C, H, W), however it is spelled."""
    return max_pooling(gm, node) is not None


def replace_max_pool(gm: fx.GraphModule, node: fx.Node, bits: int) -> None:
    """Replace the pooling by its coded form; the bits follow from the window."""
    module = max_pooling(gm, node)
    assert module is not None
    replace_node(gm, node, module, (node.all_input_nodes[0],))


def max_pooling(gm: fx.GraphModule, node: fx.Node) -> CodedMaxPool | None:
    """The coded form of the max pooling that a node computes; None for any other node."""
    call = call_of(gm, node)
    if call is None or call.operator is not F.max_pool2d:
        return None
    value, options = node.meta.get("val"), call.options
    if len(call.nodes) != 1 or options["return_indices"] or not isinstance(value, torch.Tensor) or value.ndim != 4:
        return None
    rows, columns = options["kernel_size"]
    if rows * columns > LARGEST:
        return None
    strides, padding, dilation = (options[name] for name in ("stride", "padding", "dilation"))
    return CodedMaxPool((rows, columns), strides, padding, dilation, ceil_mode=options["ceil_mode"])
