"""Fused attention.

    before  scaled_dot_product_attention    keeps q, k, v, its output and a number a row
    after   CodedInput (plan "recompute")   keeps 4 bits of q, k and v; the backward computes the attention again
    after   CodedAttention (plan "map")     keeps 4 bits of q, k, v and the map; the backward multiplies matrices alone

What makes a mask for one attention alone is made again, not kept. The plan "map" leaves to the other one: dropout, masks that
train, grouped queries.
"""

import torch
import torch.nn.functional as F
from torch import fx

from s2a_fx.graph.calls import Call, call_of
from s2a_fx.graph.edit import replace_node
from s2a_fx.graph.flow import dependent_nodes, trained_nodes
from s2a_fx.nn.coded_attention import CodedAttention
from s2a_fx.nn.coded_input import GROUP, WHOLE, Parts
from s2a_fx.nn.recompute import of_each_part
from s2a_fx.passes.forms.inputs import is_float, replace_by_coded_input
from s2a_fx.passes.fuse_attention import zero_scores

_MAKES_MASKS = (torch.add, torch.reshape, torch.transpose)


def serves_attention(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is an attention, however it is spelled."""
    return _attention(gm, node) is not None


def _attention(gm: fx.GraphModule, node: fx.Node) -> Call | None:
    call = call_of(gm, node)
    return call if call is not None and call.operator is F.scaled_dot_product_attention else None


def replace_attention(gm: fx.GraphModule, node: fx.Node, bits: int) -> None:
    """Replace the attention, and what makes its mask, by the form that recomputes it."""
    layer = _attention(gm, node)
    assert layer is not None
    nodes = _with_what_makes_its_mask(gm, node, layer.nodes[3:])
    plain = _is_plain(layer)
    query, *others = (_source(gm, n, nodes) for n in layer.nodes[:3])
    centered = [n for n in others if n is not query] if plain else []  # a constant in a query counts
    replace_by_coded_input(gm, nodes, bits, centered, _parts(gm, layer, nodes) if plain else WHOLE)


def _is_plain(layer: Call) -> bool:
    """Without dropout: a dropped map does not add up to 1, and a constant in the values counts."""
    return not layer.options["dropout_p"] and not layer.eval_options["dropout_p"]


def _parts(gm: fx.GraphModule, layer: Call, nodes: tuple[fx.Node, ...]) -> Parts:
    """Over what parts of its first dimension an attention is computed; all at once where its mask may not be cut alike."""
    query, value = layer.input.meta["val"], layer.node.meta["val"]
    dependent = dependent_nodes(gm)
    calls = {n: call_of(gm, n) for n in nodes}
    makes = [n for n, call in calls.items() if n is not layer.node and not (call and call.operator is torch.transpose)]
    views = [call for call in calls.values() if call is not None and call.operator is torch.reshape]
    masks = {(o, n) for n in nodes for o in n.all_input_nodes if o not in nodes and not (o in dependent and is_float(o))}
    rows, elements = query.shape[0], value[:1].numel()
    if not elements or elements % GROUP or any(view.options["shape"][0] != -1 for view in views):
        return WHOLE
    if not all(_broadcasts(*mask) for mask in masks):
        return WHOLE
    together = max((rows // view.node.meta["val"].shape[0] for view in views), default=1)
    # q, k, v, the output, and the gradient of each; a mask as it is made
    needed = 8 * elements + (2 * query.shape[1:-1].numel() * layer.nodes[1].meta["val"].shape[-2] if makes else 0)
    return Parts(of_each_part(together * needed * value.element_size()) * together, together, forward=bool(makes))


def _broadcasts(operand: fx.Node, reader: fx.Node) -> bool:
    """Whether what is no tensor, or the same for every image, is read."""
    value, made = operand.meta.get("val"), reader.meta["val"]
    return not isinstance(value, torch.Tensor) or value.ndim < made.ndim or value.shape[0] == 1


def _source(gm: fx.GraphModule, node: fx.Node, inside: tuple[fx.Node, ...]) -> fx.Node | None:
    """Where keys or values come from, outside of the nodes; None if they lie transposed there."""
    turns = 0
    while node in inside and (call := _transpose(gm, node)) and (call.options["dim0"], call.options["dim1"]) == (-2, -1):
        node, turns = call.input, turns + 1
    return None if turns % 2 or node in inside else node


def _transpose(gm: fx.GraphModule, node: fx.Node) -> Call | None:
    call = call_of(gm, node)
    return call if call is not None and call.operator is torch.transpose else None


def _with_what_makes_its_mask(gm: fx.GraphModule, attention: fx.Node, masks: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
    """The attention, and what makes its mask for it alone: one as wide as the map is made again, not kept."""
    above = {*masks}
    run = {attention}
    for node in reversed(list(attention.graph.nodes)):
        if not node.users or any(user not in run for user in node.users):
            continue
        makes = node in above or _transpose(gm, node)  # keys are turned back and forth around a mask
        if makes and _makes_masks(gm, node):
            run.add(node)
            above.update(node.all_input_nodes)
    return tuple(node for node in attention.graph.nodes if node in run)


def _makes_masks(gm: fx.GraphModule, node: fx.Node) -> bool:
    call = call_of(gm, node)
    return node.target is zero_scores or (call is not None and call.operator in _MAKES_MASKS and call.in_place is None)


def serves_map(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is an attention without dropout, as many keys as queries have heads, whose mask needs no gradient."""
    layer = _attention(gm, node)
    if layer is None or not _is_plain(layer) or layer.options["enable_gqa"]:
        return False
    shapes = [o.meta["val"].shape for o in layer.nodes[:3]]
    return (
        all(len(shape) == 4 and shape[:2] == shapes[0][:2] for shape in shapes)
        and layer.node.meta["val"].shape[-1] == shapes[2][-1]
        and trained_nodes(gm).isdisjoint(layer.nodes[3:])
    )


def replace_map(gm: fx.GraphModule, node: fx.Node, bits: int) -> None:
    """Replace the attention by the form that keeps its map."""
    layer = _attention(gm, node)
    assert layer is not None
    query, key = (o.meta["val"] for o in layer.nodes[:2])
    of_one = query[:1].numel() // query.shape[-1] * key.shape[-2] * 3 * 4  # the map, its gradient, and their product, float32
    packable = all(o.meta["val"][:1].numel() % GROUP == 0 for o in layer.nodes[:3])
    images = of_each_part(of_one) if packable and of_one else 0
    replace_node(gm, node, CodedAttention(layer.options["scale"], layer.options["is_causal"], bits, images), layer.nodes)
