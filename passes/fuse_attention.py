"""Write attention that a model spells out as PyTorch's fused operator, which never makes the map.

    before  softmax(q @ k^T * scale + bias) @ v      keeps the map, twice in one storage, q, k and v
    after   scaled_dot_product_attention             keeps q, k, v, its output and a number a row

What is added to the scores, through views if need be (the masks of shifted windows), becomes the operator's mask: it is what the
same nodes make of zeros. Values change in the last digits.

Leaves alone, with a note: a map that is read otherwise, dropout on it, masks whose gradient is asked for (the fused kernels have
none, and the unfused one keeps the map).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from s2a_fx.analysis.attention_map import product_with_values
from s2a_fx.graph.calls import Call, call_of, find_calls
from s2a_fx.graph.flow import dependent_nodes, reaches, trained_nodes
from s2a_fx.graph.metadata import add_note
from s2a_fx.graph.regions import SCOPES, in_one_context, scopes_of
from s2a_fx.passes.base import Pass

_SCALES = {torch.mul: 1, torch.div: -1}
"""Operator -> the power to which it scales by its other operand."""


@dataclass(frozen=True)
class FuseAttention(Pass):
    """Replace softmax(q @ k^T) @ v by `scaled_dot_product_attention`."""

    def rewrite(self, gm: fx.GraphModule) -> bool:
        dependent, trained = dependent_nodes(gm), trained_nodes(gm)
        modified = False
        for softmax in find_calls(gm, F.softmax):
            reason = _fuse(gm, softmax, dependent, trained)
            modified |= reason is None
            if reason:
                add_note(gm, "FuseAttention", softmax.node.name, reason)
        return modified


def zero_scores(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Zeros of the shape of `query @ keys`, (..., N, K), without memory of their own."""
    return query.new_zeros(()).expand(query.shape[:-1] + keys.shape[-1:])


def _fuse(gm: fx.GraphModule, softmax: Call, dependent: set[fx.Node], trained: set[fx.Node]) -> str | None:
    """Fuse the attention around one softmax; returns why not."""
    product = product_with_values(gm, softmax)
    if product is None:
        return "its map is not simply multiplied with values"
    matmul, value, dropout_p = product
    if dropout_p:
        return "has dropout on its map"
    added, scale, scores = _scores(gm, softmax.input, dependent)
    if scores is None or not in_one_context(softmax.node, softmax.input):
        return "its scores are not a product of two activations, scaled and added to"
    if scores.node.meta["val"].shape != softmax.node.meta["val"].shape or any(not t.meta["val"].is_floating_point() for t in added):
        return "its scores are reshaped, or a mask of another type than theirs is added"
    if not trained.isdisjoint(added):
        return "what is added to its scores is trained"
    query, keys = scores.nodes
    if any(n.meta["val"].ndim != 4 for n in (query, keys, value)):
        return "its heads are no dimension of their own"
    with gm.graph.inserting_before(matmul):
        mask = _mask(gm, softmax.input, scores)
        key = gm.graph.call_method("transpose", (keys, -2, -1))
        options: dict[str, Any] = {"attn_mask": mask, "scale": scale}
        fused = gm.graph.call_function(F.scaled_dot_product_attention, (query, key, value), options)
    for new in (key, fused):
        new.meta |= {"nn_module_stack": softmax.node.meta.get("nn_module_stack", {}), SCOPES: scopes_of(matmul)}
    fused.meta["val"] = matmul.meta["val"]
    matmul.replace_all_uses_with(fused)
    gm.graph.erase_node(matmul)
    return None


def _scores(gm: fx.GraphModule, node: fx.Node, dependent: set[fx.Node]) -> tuple[list[fx.Node], float, Call | None]:
    """From the softmax's operand back to the product of queries and keys: what is added on the way, the scale, the product."""
    added: list[fx.Node] = []
    scale = 1.0
    while (call := call_of(gm, node)) is not None and call.operator is not torch.matmul:
        tensors = [o for o in node.all_input_nodes if isinstance(o.meta.get("val"), torch.Tensor)]
        through = [o for o in tensors if o in dependent]
        if len(through) != 1 or not in_one_context(node, *through) or call.in_place:
            return added, scale, None
        if len(through[0].users) != 1 + _shape_readers(through[0]):
            return added, scale, None
        other = call.options.get("other")
        if call.operator is torch.add and len(tensors) == 2 and scale == 1.0 and call.options["alpha"] == 1:
            added += [o for o in tensors if o not in dependent]
        elif call.operator in _SCALES and call.input is through[0] and isinstance(other, int | float) and _divides_plainly(call):
            scale *= other ** _SCALES[call.operator]
        elif call.operator is not torch.reshape:
            return added, scale, None
        node = through[0]
    if call is None or not all(operand in dependent for operand in call.nodes):
        return added, scale, None
    return added, scale, call


def _divides_plainly(call: Call) -> bool:
    return call.options.get("rounding_mode") is None


def _shape_readers(node: fx.Node) -> int:
    return sum(not isinstance(user.meta.get("val"), torch.Tensor) for user in node.users)


def _mask(gm: fx.GraphModule, operand: fx.Node, scores: Call) -> fx.Node | None:
    """What the nodes between the product and the softmax add to the scores; scaling nodes among them are left out."""
    chain: list[Call] = []
    node = operand
    while node is not scores.node:
        call = call_of(gm, node)
        assert call is not None
        chain.append(call)
        node = next(o for o in node.all_input_nodes if reaches(o, {scores.node}))
    terms = [call for call in chain if call.operator not in _SCALES]
    if not terms:
        return None
    if len(terms) == 1 and terms[0].operator is torch.add:  # it broadcasts by itself
        return next(o for o in terms[0].nodes if not reaches(o, {scores.node}))
    before = scores.node
    made = gm.graph.call_function(zero_scores, scores.nodes)
    made.meta |= {"val": scores.node.meta["val"], SCOPES: scopes_of(scores.node)}
    copies = {scores.node: made}
    for call in reversed(chain):
        if call.operator in _SCALES:
            copies[call.node] = copies[before]
        else:
            copies[call.node] = gm.graph.node_copy(call.node, lambda n: copies.get(n, n))
        before = call.node
    return copies[operand]
