"""The classification heads of a model: the linear layers that its output comes from."""

import operator

import torch
import torch.nn.functional as F
from torch import fx, nn

from s2a_fx.graph.layout import layout_of
from s2a_fx.graph.structure import residual_blocks

_PASSES_THROUGH = (nn.Identity, nn.Dropout, nn.Flatten)
_COMBINES = (operator.add, operator.truediv, operator.mul, operator.getitem, torch.add, torch.flatten, F.dropout)
_METHODS = ("flatten", "view", "reshape", "squeeze", "add", "div")


def classification_heads(gm: fx.GraphModule) -> tuple[fx.Node, ...]:
    """The layers (B, C) -> (B, classes), `nn.Linear` or 1x1 convolutions, that the output is made of without a further layer.

    Several for models that average heads (distilled transformers); none for a feature extractor.
    """
    (output,) = [n for n in gm.graph.nodes if n.op == "output"]
    heads: list[fx.Node] = []
    seen: set[fx.Node] = set()
    stack = list(output.all_input_nodes)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if _is_head(gm, node):
            heads.append(node)
        elif _is_transparent(gm, node):
            stack += node.all_input_nodes
        elif node.op != "get_attr":
            return ()
    return tuple(sorted(heads, key=lambda n: n.name))


def head_paths(gm: fx.GraphModule) -> tuple[str, ...]:
    """The module paths of the classification heads."""
    return tuple(dict.fromkeys(str(node.target) for node in classification_heads(gm)))


def _is_head(gm: fx.GraphModule, node: fx.Node) -> bool:
    value = node.meta.get("val")
    if node.op != "call_module" or not isinstance(value, torch.Tensor):
        return False
    module = gm.get_submodule(str(node.target))
    if isinstance(module, nn.Linear):
        return value.ndim == 2
    return isinstance(module, nn.Conv2d) and tuple(value.shape[2:]) == (1, 1)


def _is_transparent(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(gm.get_submodule(str(node.target)), _PASSES_THROUGH)
    return node.target in _COMBINES if node.op == "call_function" else node.target in _METHODS


def last_feature(gm: fx.GraphModule) -> fx.Node | None:
    """The last feature with positions, which is pooled, or of which a token is taken, for the heads; None without one for all.

    It is the output of the last residual block, or computed from it: of a norm, say, but not a slice of its positions.
    """
    blocks = residual_blocks(gm)
    found = {_positions_above(gm, node, blocks[-1].output) for node in classification_heads(gm)} if blocks else set()
    return found.pop() if len(found) == 1 else None


def _positions_above(gm: fx.GraphModule, head: fx.Node, last_output: fx.Node) -> fx.Node | None:
    node = head.all_input_nodes[0]
    pooled = node.meta["val"][:1].numel()
    while node.all_input_nodes:
        node = node.all_input_nodes[0]
        value = node.meta.get("val")
        passed_on = node.target is operator.getitem or (
            node.op == "call_module" and isinstance(gm.get_submodule(str(node.target)), nn.Identity)
        )
        wide = isinstance(value, torch.Tensor) and value[:1].numel() > pooled and not passed_on
        if wide or node is last_output:
            return node if layout_of(gm, node) else None
    return None
