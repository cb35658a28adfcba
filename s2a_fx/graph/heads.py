"""The classification heads of a model: the last layers that its output is made of.

Between a head and the output may stand anything without parameters: a loss, a softmax, an argmax, an average of two heads, a pool.
"""

import operator
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import fx, nn

from s2a_fx.graph.calls import call_of, operator_of
from s2a_fx.graph.flow import attribute, dependent_nodes
from s2a_fx.graph.layout import layout_of
from s2a_fx.graph.regions import Region
from s2a_fx.graph.structure import residual_blocks

_PRODUCTS = (F.linear, torch.matmul)


def classification_heads(gm: fx.GraphModule) -> tuple[fx.Node, ...]:
    """The layers from features to classes that the output is made of without a further layer.

    They are `nn.Linear`, 1x1 convolutions, and products with a parameter. Several for models that average heads (distilled
    transformers) or return several; none for a feature extractor.
    """
    dependent = dependent_nodes(gm)
    found = [node for node in _last_layers(gm, dependent) if _is_head(gm, node, dependent)]
    classes = {node.meta["val"].shape[1] for node in found if _rank(node) == 2}
    if classes:  # a layer over tokens or maps beside those is one only of as many classes: an auxiliary head
        found = [node for node in found if _classes(gm, node) in classes]
    else:
        found = [node for node in found if _is_convolution(gm, node)]
    return tuple(node for node in gm.graph.nodes if node in found)


def head_paths(gm: fx.GraphModule) -> tuple[str, ...]:
    """The module paths of the classification heads that are modules."""
    return tuple(dict.fromkeys(str(node.target) for node in classification_heads(gm) if node.op == "call_module"))


def head_parameters(gm: fx.GraphModule) -> frozenset[str]:
    """The names of the parameters of the classification heads."""
    names: set[str] = set()
    for node in classification_heads(gm):
        if node.op == "call_module":
            names |= {f"{node.target}.{name}" for name, _ in gm.get_submodule(str(node.target)).named_parameters()}
        else:
            names |= {name for operand in node.all_input_nodes[1:] for name in _parameters_above(gm, operand)}
    return frozenset(names)


def _last_layers(gm: fx.GraphModule, dependent: set[fx.Node]) -> Iterator[fx.Node]:
    """The nodes with parameters that the output is computed from without a further one."""
    seen: set[fx.Node] = set()
    stack = list(gm.graph.output_node().all_input_nodes)
    while stack:
        node = stack.pop()
        if node in seen or node not in dependent:
            continue
        seen.add(node)
        if _has_parameters(gm, node, dependent):
            yield node
        else:
            stack += node.all_input_nodes


def _has_parameters(gm: fx.GraphModule, node: fx.Node, dependent: set[fx.Node]) -> bool:
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return not isinstance(module, Region) and next(module.parameters(), None) is not None
    return any(True for operand in node.all_input_nodes if operand not in dependent for _ in _parameters_above(gm, operand))


def _parameters_above(gm: fx.GraphModule, node: fx.Node) -> Iterator[str]:
    """The names of the parameters that a node, which depends on no input, is made of."""
    if node.op == "get_attr" and isinstance(attribute(gm, str(node.target)), nn.Parameter):
        yield str(node.target)
    for operand in node.all_input_nodes:
        yield from _parameters_above(gm, operand)


def _is_head(gm: fx.GraphModule, node: fx.Node, dependent: set[fx.Node]) -> bool:
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    if node.op == "call_module":
        return isinstance(gm.get_submodule(str(node.target)), nn.Linear) or _is_convolution(gm, node)
    call = call_of(gm, node)
    if call is None or len(call.nodes) < 2:
        return False
    x, weight = call.nodes[:2]
    if x not in dependent or weight in dependent:
        return False
    return _is_convolution(gm, node) or (call.operator in _PRODUCTS and _rank(node) == _rank(weight) == 2)


def _is_convolution(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is a convolution of one position, a layer or a function over a parameter."""
    if operator_of(gm, node) is not F.conv2d:
        return False
    if node.op == "call_module":
        return gm.get_submodule(str(node.target)).kernel_size == (1, 1)
    call = call_of(gm, node)
    weight = None if call is None else call.operands["weight"]
    return isinstance(weight, fx.Node) and tuple(weight.meta["val"].shape[2:]) == (1, 1)


def _rank(node: fx.Node) -> int:
    """The dimensions of a value, those of one position left out."""
    value = node.meta["val"]
    return value.ndim - 2 if value.ndim == 4 and tuple(value.shape[2:]) == (1, 1) else value.ndim


def _classes(gm: fx.GraphModule, node: fx.Node) -> int:
    value = node.meta["val"]
    return int(value.shape[1] if _is_convolution(gm, node) else value.shape[-1])


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
        passed_on = operator_of(gm, node) in (operator.getitem, nn.Identity)
        wide = isinstance(value, torch.Tensor) and value[:1].numel() > pooled and not passed_on
        if wide or node is last_output:
            return node if layout_of(gm, node) else None
    return None
