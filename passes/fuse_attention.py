"""Write attention that a model spells out as PyTorch's fused operator, which never makes the map.

    before  softmax(q @ k^T * scale + bias) @ v      keeps the map, twice in one storage, q, k and v
    after   scaled_dot_product_attention             keeps q, k, v, its output and a number a row

What is added to the scores, through views if need be (the masks of shifted windows), becomes the operator's mask: it is what the
same nodes make of zeros. Values change in the last digits.

Leaves alone, with a note: a map that is read otherwise, dropout on it, masks whose gradient is asked for (the fused kernels have
none, and the unfused one keeps the map).
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from s2a_fx.analysis.non_parametric import non_parametric, product_with_values
from s2a_fx.graph.flow import dependent_nodes, reaches, trained_nodes
from s2a_fx.graph.metadata import add_note
from s2a_fx.passes.base import Pass

_MATMULS = (operator.matmul, torch.matmul, torch.bmm, "matmul", "bmm")
_SCALES = {operator.mul: 1, torch.mul: 1, "mul": 1, operator.truediv: -1, torch.div: -1, "div": -1}
_ADDS = (operator.add, torch.add, "add")
_VIEWS = ("view", "reshape")


@dataclass(frozen=True)
class FuseAttention(Pass):
    """Replace softmax(q @ k^T) @ v by `scaled_dot_product_attention`."""

    def rewrite(self, gm: fx.GraphModule) -> bool:
        dependent, trained = dependent_nodes(gm), trained_nodes(gm)
        modified = False
        for node in list(gm.graph.nodes):
            layer = non_parametric(gm, node)
            if layer is None or layer.kind != "softmax":
                continue
            reason = _fuse(gm, node, dependent, trained)
            modified |= reason is None
            if reason:
                add_note(gm, "FuseAttention", node.name, reason)
        return modified


def zero_scores(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Zeros of the shape of `query @ keys`, (..., N, K), without memory of their own."""
    return query.new_zeros(()).expand(query.shape[:-1] + keys.shape[-1:])


def _fuse(gm: fx.GraphModule, softmax: fx.Node, dependent: set[fx.Node], trained: set[fx.Node]) -> str | None:
    """Fuse the attention around one softmax; returns why not."""
    product = product_with_values(gm, softmax)
    if product is None:
        return "its map is not simply multiplied with values"
    matmul, value, dropout_p = product
    if dropout_p:
        return "has dropout on its map"
    added, scale, scores = _scores(softmax.all_input_nodes[0], dependent)
    if scores is None:
        return "its scores are not a product of two activations, scaled and added to"
    if scores.meta["val"].shape != softmax.meta["val"].shape or any(not t.meta["val"].is_floating_point() for t in added):
        return "its scores are reshaped, or a mask of another type than theirs is added"
    if not trained.isdisjoint(added):
        return "what is added to its scores is trained"
    query, keys = scores.args[:2]
    assert isinstance(query, fx.Node) and isinstance(keys, fx.Node)
    if any(n.meta["val"].ndim != 4 for n in (query, keys, value)):
        return "its heads are no dimension of their own"
    with gm.graph.inserting_before(matmul):
        mask = _mask(gm, softmax.all_input_nodes[0], scores, query, keys)
        key = gm.graph.call_method("transpose", (keys, -2, -1))
        options: dict[str, Any] = {"attn_mask": mask, "scale": scale}
        fused = gm.graph.call_function(F.scaled_dot_product_attention, (query, key, value), options)
    for new in (key, fused):
        new.meta["nn_module_stack"] = softmax.meta.get("nn_module_stack", {})
    fused.meta["val"] = matmul.meta["val"]
    matmul.replace_all_uses_with(fused)
    gm.graph.erase_node(matmul)
    return None


def _scores(node: fx.Node, dependent: set[fx.Node]) -> tuple[list[fx.Node], float, fx.Node | None]:
    """From the softmax's operand back to the product of queries and keys: what is added on the way, the scale, the product."""
    added: list[fx.Node] = []
    scale = 1.0
    while node.target not in _MATMULS:
        tensors = [o for o in node.all_input_nodes if isinstance(o.meta.get("val"), torch.Tensor)]
        through = [o for o in tensors if o in dependent]
        if len(through) != 1 or len(through[0].users) != 1 + _shape_readers(through[0]):
            return added, scale, None
        if node.kwargs:
            return added, scale, None
        if node.target in _ADDS and len(tensors) == 2 and scale == 1.0:
            added += [o for o in tensors if o not in dependent]
        elif node.target in _SCALES and len(tensors) == 1 and isinstance(node.args[1], int | float):
            scale *= node.args[1] ** _SCALES[node.target]
        elif node.target not in _VIEWS:
            return added, scale, None
        node = through[0]
    operands = node.args[:2]
    if not all(isinstance(o, fx.Node) and o in dependent for o in operands):
        return added, scale, None
    return added, scale, node


def _shape_readers(node: fx.Node) -> int:
    return sum(not isinstance(user.meta.get("val"), torch.Tensor) for user in node.users)


def _mask(gm: fx.GraphModule, operand: fx.Node, scores: fx.Node, query: fx.Node, keys: fx.Node) -> fx.Node | None:
    """What the nodes between the product and the softmax add to the scores; scaling nodes among them are left out."""
    chain: list[fx.Node] = []
    node = operand
    while node is not scores:
        chain.append(node)
        node = next(o for o in node.all_input_nodes if reaches(o, {scores}))
    terms = [n for n in chain if n.target not in _SCALES]
    if not terms:
        return None
    if len(terms) == 1 and terms[0].target in _ADDS:  # it broadcasts by itself
        return next(o for o in terms[0].all_input_nodes if not reaches(o, {scores}))
    before: fx.Node = scores
    made = gm.graph.call_function(zero_scores, (query, keys))
    made.meta["val"] = scores.meta["val"]
    copies = {scores: made}
    for node in reversed(chain):
        if node.target in _SCALES:
            copies[node] = copies[before]
        else:
            copies[node] = gm.graph.node_copy(node, lambda n: copies.get(n, n))
        before = node
    return copies[operand]
