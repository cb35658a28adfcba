"""Quantize what GELU, SiLU, ReLU and softmax keep, exactly as the paper writes it (section 3.2).

    before  gelu(x)                      keeps x, 32 bits an element
    after   QuantizedGELU(x)             keeps 4 bits an element, eq. (10) to (12); SiLU likewise
    before  relu(x)                      keeps its output
    after   QuantizedReLU(x)             keeps 1 bit an element
    before  dropout(softmax(s)) @ v      keeps the map, twice in one storage, and v
    after   QuantizedSoftmaxMatmul(s, v) keeps the map once, at 4 bits, eq. (8) and (9), and v
    before  fused attention              keeps q, k, v, output and logsumexp
    after   QuantizedAttention           keeps q, k, v and the map at 4 bits

The values computed in the forward do not change. A tensor has one range for all images, as in the paper: one NaN or infinity in an
image makes the gradients of all images NaN.

Leaves alone, each time with a note:

1. a layer through which no gradient flows: it keeps nothing;
2. a layer whose tensor another node keeps anyway: nothing would be freed (a ReLU before a convolution, which keeps its input
   even when frozen);
3. a map that has other readers than the product with the values, shapes that broadcast in that product, grouped-query attention
   and a softmax that changes the dtype;
4. layers hidden inside leaf modules.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn

from s2a_fx.analysis.attention_map import product_with_values
from s2a_fx.analysis.saved import SavedTensor, is_activation, saved_tensors
from s2a_fx.errors import InputError
from s2a_fx.graph.calls import Call, call_of
from s2a_fx.graph.edit import replace_node
from s2a_fx.graph.metadata import add_note
from s2a_fx.nn.quantized import (
    QuantizedAttention,
    QuantizedGELU,
    QuantizedReLU,
    QuantizedSiLU,
    QuantizedSoftmax,
    QuantizedSoftmaxMatmul,
)
from s2a_fx.ops.bits import BITS
from s2a_fx.passes.base import Pass

_OPERATORS = (F.gelu, F.silu, F.relu, F.softmax, F.scaled_dot_product_attention)
_HIDDEN = ("GeluBackward", "SiluBackward", "ReluBackward", "SoftmaxBackward", "ScaledDotProduct")


@dataclass(frozen=True)
class QuantizeNonParametric(Pass):
    """Quantize the activations kept by non-parametric layers.

    Args:
        bits: per element of GELU's, SiLU's and softmax's tensors: 1, 2, 4 or 8; the paper takes 4. ReLU takes 1.
    """

    bits: int = 4

    def __post_init__(self) -> None:
        if self.bits not in BITS or isinstance(self.bits, bool):
            raise InputError(f"QuantizeNonParametric: bits must be one of {', '.join(map(str, BITS))}, got {self.bits!r}.")

    def rewrite(self, gm: fx.GraphModule) -> bool:
        rows = [row for row in saved_tensors(gm) if is_activation(row)]
        calls = [call_of(gm, node) for node in gm.graph.nodes]
        layers = [call for call in calls if call is not None and call.operator in _OPERATORS]
        known = {layer.node.name for layer in layers}
        modified = False
        for layer in layers:
            reason = self._replace(gm, layer, rows)
            modified |= reason is None
            if reason:
                add_note(gm, "QuantizeNonParametric", layer.node.name, reason)
        for row in rows:
            for holder in row.holders:
                if holder.operand.startswith(_HIDDEN) and holder.node not in known:
                    add_note(gm, "QuantizeNonParametric", holder.node, f"hidden inside the leaf module {row.op}")
        return modified

    def _replace(self, gm: fx.GraphModule, layer: Call, rows: list[SavedTensor]) -> str | None:
        """Replace one layer; returns why not."""
        held = [row for row in rows if any(holder.node == layer.node.name for holder in row.holders)]
        if not held:
            return "keeps nothing: no gradient flows through it"
        if layer.operator is F.scaled_dot_product_attention:
            return self._replace_attention(gm, layer)
        if layer.operator is F.softmax:
            return self._replace_softmax(gm, layer, held)
        if other := _other_holder(held, {layer.node.name}):
            return f"{other} keeps the same tensor anyway"
        module: nn.Module
        if layer.operator is F.gelu:
            module = QuantizedGELU(layer.options["approximate"], self.bits)
        elif layer.operator is F.silu:
            module = QuantizedSiLU(self.bits)
        else:
            module = QuantizedReLU()
        call = _substitute(gm, layer.node, module, (layer.input,))
        if layer.in_place:  # later readers of the input meant the overwritten one
            layer.input.replace_all_uses_with(call, delete_user_cb=lambda user: user > call)
        return None

    def _replace_attention(self, gm: fx.GraphModule, layer: Call) -> str | None:
        options = {**layer.options, "eval_dropout_p": layer.eval_options["dropout_p"]}
        query, key = (_shape(operand) for operand in layer.nodes[:2])
        if options.pop("enable_gqa") or query[:-2] != key[:-2]:
            return "grouped-query attention: its map is wider than its keys"
        _substitute(gm, layer.node, QuantizedAttention(**options, bits=self.bits), layer.nodes)
        return None

    def _replace_softmax(self, gm: fx.GraphModule, layer: Call, held: list[SavedTensor]) -> str | None:
        if layer.options["dtype"] is not None:
            return "changes the dtype"
        if layer.options["dim"] is None:
            return "has no explicit dimension"
        dim, rank = layer.options["dim"], len(_shape(layer.node))
        product = product_with_values(gm, layer) if dim in (-1, rank - 1) else None
        if product is not None:
            matmul, value, dropout_p = product
            _substitute(gm, matmul, QuantizedSoftmaxMatmul(dropout_p, self.bits), (layer.input, value))
            return None
        own = [row for row in held if row.made_at == layer.node.name]
        if other := _other_holder(own, {layer.node.name}):
            return f"{other} keeps the same map, and is not a plain product with values of the same leading shape"
        _substitute(gm, layer.node, QuantizedSoftmax(dim, self.bits), (layer.input,))
        return None


def _other_holder(rows: list[SavedTensor], own: set[str]) -> str | None:
    return next((str(holder) for row in rows for holder in row.holders if holder.node not in own), None)


def _substitute(gm: fx.GraphModule, node: fx.Node, module: nn.Module, operands: tuple[fx.Node, ...]) -> fx.Node:
    sole = node.op == "call_module" and sum(other.target == node.target for other in gm.graph.nodes) == 1
    return replace_node(gm, node, module, operands, str(node.target) if sole else None)


def _shape(node: fx.Node) -> torch.Size:
    return node.meta["val"].shape
