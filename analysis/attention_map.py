"""The product that an attention written out multiplies its map with."""

import torch
import torch.nn.functional as F
from torch import fx

from s2a_fx.analysis.activations import dropout_probability
from s2a_fx.graph import torch_internals
from s2a_fx.graph.calls import Call, call_of, canonical, operator_of
from s2a_fx.graph.leaf import leaf_calls
from s2a_fx.graph.regions import Region, in_one_context
from s2a_fx.nn.coded_attention import CodedAttention
from s2a_fx.nn.quantized import QuantizedAttention, QuantizedSoftmax, QuantizedSoftmaxMatmul

_CODED_MAPS = (CodedAttention, QuantizedAttention, QuantizedSoftmax, QuantizedSoftmaxMatmul)
_ATEN_MAPS = frozenset(map(canonical, torch_internals.ATTENTION_MAPS))
"""What a softmax or a fused attention is below autograd."""


def product_with_values(gm: fx.GraphModule, softmax: Call) -> tuple[fx.Node, fx.Node, float] | None:
    """The product, the values and the dropout's p in `dropout(softmax) @ values`; None where the map is read otherwise.

    The softmax runs over the last dimension, in its operand's dtype.
    """
    node, shape = softmax.node, softmax.node.meta["val"].shape
    if softmax.options["dim"] not in (-1, len(shape) - 1) or softmax.options["dtype"] is not None:
        return None
    dropout_p = 0.0
    while len(node.users) == 1:
        (user,) = node.users
        call = call_of(gm, user)
        drop = dropout_probability(call)
        if drop is not None:
            if dropout_p and drop:
                return None
            node, dropout_p = user, 1 - (1 - dropout_p) * (1 - drop)
            continue
        if call is None or call.operator is not torch.matmul or call.operands["input"] is not node:
            return None
        value = call.operands["other"]
        assert isinstance(value, fx.Node)
        together = in_one_context(user, softmax.node) and value.meta["val"].shape[:-2] == shape[:-2]
        return (user, value, dropout_p) if together else None
    return None


def attends(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node computes an attention's map, in a module that runs it again or in a leaf, too."""
    module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
    if isinstance(module, Region):
        return any(attends(body, inner) for body in module.bodies() for inner in body.graph.nodes)
    if isinstance(module, _CODED_MAPS) or computes_map(call_of(gm, node)):
        return True
    calls = leaf_calls(gm, node) if module is not None and operator_of(gm, node) is None else None
    return calls is not None and any(operator in _ATEN_MAPS for operator in calls.operators)


def computes_map(call: Call | None) -> bool:
    """Whether a call computes an attention's map, or a map like it: a softmax or a fused attention."""
    return call is not None and call.operator in (F.softmax, F.scaled_dot_product_attention)
