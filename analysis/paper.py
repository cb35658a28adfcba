"""The paper's accounting of training memory: a count over leaf modules, not what autograd keeps.

Counted, each in 4-byte elements at the traced batch size:

1. all parameters, once, trained or not;
2. the input of every linear, convolution and normalization layer whose weight trains, eq. (2);
3. the input of every GELU, SiLU and ReLU and the map of every softmax, eq. (7) to (12), where a gradient flows through it, or
   through any other block of the backbone; of a quantized one, `bits` instead of 32 bits an element;
4. the codes of the compression engine's layers, which the paper does not know, norms and attention included; the input of a
   checkpointed block.

The paper leaves out: q, k and v of the attention's products; what a frozen normalization or convolution keeps; the side branch's
normalization and activation; the low-rank prompt; gradients, optimizer state and temporaries. The `saved` and `peak` figures
of a report leave nothing out.
"""

import torch
import torch.nn.functional as F
from torch import fx

from s2a_fx.graph.calls import Call, call_of, operator_of
from s2a_fx.graph.flow import attribute, trained_nodes
from s2a_fx.graph.provenance import module_stack
from s2a_fx.graph.structure import residual_blocks
from s2a_fx.nn.checkpointed import Checkpointed
from s2a_fx.nn.coded import CodedActivation, CodedLayerNorm, MaskedActivation
from s2a_fx.nn.coded_attention import CodedAttention
from s2a_fx.nn.coded_input import CodedInput
from s2a_fx.nn.coded_mlp import CodedMLP
from s2a_fx.nn.lite_side_branch import LiteSideBlock
from s2a_fx.nn.quantized import (
    QuantizedAttention,
    QuantizedGELU,
    QuantizedReLU,
    QuantizedSiLU,
    QuantizedSoftmax,
    QuantizedSoftmaxMatmul,
)
from s2a_fx.nn.recomputed_branch import RecomputedBranch

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_PARAMETRIC = (F.linear, *_CONVOLUTIONS, F.layer_norm, F.group_norm, F.batch_norm)
_NON_PARAMETRIC = (F.gelu, F.silu, F.relu, F.softmax)


def paper_bytes(gm: fx.GraphModule) -> int:
    """Training memory of `gm` in bytes, as the paper counts it."""
    trained = trained_nodes(gm)
    total = sum(p.numel() for p in gm.parameters()) * 32
    counted = trained | _backbone_through_which_gradients_flow(gm, trained)
    for node in gm.graph.nodes:
        call = call_of(gm, node)
        if _trains_its_weight(gm, node, call) and not _normalizes_side_branch(gm, node):
            total += _elements(node.all_input_nodes[0]) * 32
        elif not counted.isdisjoint((node, *node.all_input_nodes)) and (not _in_side_branch(node) or _is_coded_input(gm, node)):
            total += _kept_bits(gm, node, call)
    return total // 8


def _backbone_through_which_gradients_flow(gm: fx.GraphModule, trained: set[fx.Node]) -> set[fx.Node]:
    """The nodes of all residual blocks, (3), if any of these blocks is trained."""
    blocks = residual_blocks(gm)
    flows = any(block.output in trained for block in blocks)
    return {node for block in blocks for node in block.nodes} if flows else set()


def _trains_its_weight(gm: fx.GraphModule, node: fx.Node, call: Call | None) -> bool:
    if (operator_of(gm, node) if call is None else call.operator) not in _PARAMETRIC:
        return False
    if call is None:  # a class derived from such a layer, whose weight may be computed, by a power iteration say
        named = gm.get_submodule(str(node.target)).named_parameters()
        return any(p.requires_grad for name, p in named if "bias" not in name.split("."))
    path = call.path_of("weight")
    weight = None if path is None else attribute(gm, path)
    return isinstance(weight, torch.Tensor) and weight.requires_grad


def _in_side_branch(node: fx.Node) -> bool:
    return any(kind is LiteSideBlock for _, kind in module_stack(node))


def _is_coded_input(gm: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(gm.get_submodule(str(node.target)), CodedInput)


def _normalizes_side_branch(gm: fx.GraphModule, node: fx.Node) -> bool:
    return _in_side_branch(node) and operator_of(gm, node) not in _CONVOLUTIONS


def _kept_bits(gm: fx.GraphModule, node: fx.Node, call: Call | None) -> int:
    if call is not None and call.operator is F.scaled_dot_product_attention:
        return _map_elements(*call.nodes[:2]) * 32
    if call is not None and call.operator in _NON_PARAMETRIC:
        return _elements(call.input) * 32
    module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
    if isinstance(module, QuantizedReLU):
        return _elements(node)
    if isinstance(module, (QuantizedAttention, CodedAttention)):
        return _map_elements(*node.all_input_nodes[:2]) * module.bits
    if isinstance(module, CodedInput):
        return sum(_elements(operand) for operand in node.all_input_nodes[: module.activations]) * module.codec.bits
    if isinstance(module, Checkpointed):
        return _elements(node.all_input_nodes[0]) * 32
    if isinstance(module, RecomputedBranch):
        return _elements(node.all_input_nodes[0]) * module.codec.bits
    if isinstance(module, CodedMLP):
        x, weight = node.all_input_nodes[:2]
        return _elements(x) // x.meta["val"].shape[-1] * weight.meta["val"].shape[0] * module.bits
    if isinstance(module, MaskedActivation):
        return _elements(node.all_input_nodes[0])
    if isinstance(module, (CodedActivation, CodedLayerNorm)):
        return _elements(node.all_input_nodes[0]) * module.bits
    if isinstance(module, (QuantizedGELU, QuantizedSiLU, QuantizedSoftmax, QuantizedSoftmaxMatmul)):
        return _elements(node.all_input_nodes[0]) * module.bits
    return 0


def _elements(node: fx.Node) -> int:
    value = node.meta["val"]
    return value.numel() if isinstance(value, torch.Tensor) else 0


def _map_elements(query: fx.Node, key: fx.Node) -> int:
    return query.meta["val"].shape[:-1].numel() * key.meta["val"].shape[-2]
