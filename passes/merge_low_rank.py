"""Add a matrix of low rank that stands beside a layer to the layer's weight.

    before  layer(x) + B(A(x)) * scale      three products, LoRA's form while it trains
    after   layer(x)                        its weight W + scale B A

Leaves alone: layers whose output is read elsewhere, too; layers of which some calls go without; A and B with biases.
"""

import operator
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from s2a_fx.analysis.flow import attribute


@dataclass(frozen=True)
class _Layer:
    """A linear layer or convolution: what it reads, its weight, what else decides its output's size, whether it has a bias."""

    node: fx.Node
    x: fx.Node
    weight: torch.Tensor
    shape: tuple[Any, ...]
    has_bias: bool


@dataclass(frozen=True)
class _Beside:
    """A layer, the sum with what stands beside it, and that by its modules."""

    layer: _Layer
    total: fx.Node
    down: str
    up: str
    scale: float


def merge_low_rank(gm: fx.GraphModule) -> bool:
    """Merge wherever it is exact, into new weights; the old ones stay as they are. Returns whether there was one."""
    found = [beside for node in gm.graph.nodes if (beside := _beside(gm, node)) is not None]
    merged: dict[str, list[_Beside]] = {}
    for beside in found:
        merged.setdefault(_weight_path(beside.layer.node), []).append(beside)
    readers = Counter(_weight_path(layer.node) for n in gm.graph.nodes if (layer := _layer(gm, n)) is not None)
    done = False
    for path, group in merged.items():
        if len(group) == readers[path] and len({(b.down, b.up, b.scale) for b in group}) == 1:
            _merge(gm, path, group)
            done = True
    return done


def _merge(gm: fx.GraphModule, path: str, group: list[_Beside]) -> None:
    down, up = (gm.get_submodule(part).weight for part in (group[0].down, group[0].up))
    weight = group[0].layer.weight
    product = torch.mm(up.flatten(1), down.flatten(1)).view(weight.shape)  # type: ignore[operator, arg-type]
    owner, _, name = path.rpartition(".")
    setattr(gm.get_submodule(owner), name, nn.Parameter(weight + group[0].scale * product, requires_grad=False))
    for beside in group:
        beside.total.replace_all_uses_with(beside.layer.node)
    gm.graph.eliminate_dead_code()


def _beside(gm: fx.GraphModule, node: fx.Node) -> _Beside | None:
    if node.target not in (operator.add, torch.add) or node.kwargs or len(node.all_input_nodes) != 2:
        return None
    for base, added in (node.args, node.args[::-1]):
        assert isinstance(base, fx.Node) and isinstance(added, fx.Node)
        scale = 1.0
        if added.target is operator.mul and len(added.users) == 1 and isinstance(added.args[1], int | float):
            scale, added = float(added.args[1]), added.args[0]  # type: ignore[assignment]
        layer, up = _layer(gm, base), _layer(gm, added)
        down = _layer(gm, up.x) if up is not None else None
        if layer is None or up is None or down is None or any(len(n.users) != 1 for n in (base, added, up.x)):
            continue
        if down.x is layer.x and _fits(layer, down, up) and added.op == up.x.op == "call_module":
            return _Beside(layer, node, str(up.x.target), str(added.target), scale)
    return None


def _fits(layer: _Layer, down: _Layer, up: _Layer) -> bool:
    pointwise = all(n == 1 for n in up.weight.shape[2:])
    plain = not up.shape or up.shape == ((1, 1), (0, 0), (1, 1))
    wanted = (up.weight.shape[0], *down.weight.shape[1:])
    return (
        layer.shape == down.shape and pointwise and plain and not (down.has_bias or up.has_bias) and layer.weight.shape == wanted
    )


def _layer(gm: fx.GraphModule, node: fx.Node) -> _Layer | None:
    if node.op == "call_module":
        module: Any = gm.get_submodule(str(node.target))
        if isinstance(module, nn.Linear):
            return _Layer(node, node.all_input_nodes[0], module.weight, (), module.bias is not None)
        if type(module) is nn.Conv2d and module.groups == 1 and module.padding_mode == "zeros" and module.padding != "same":
            padding = (0, 0) if module.padding == "valid" else module.padding
            options = (module.stride, padding, module.dilation)
            return _Layer(node, node.all_input_nodes[0], module.weight, options, module.bias is not None)
    if node.target is torch.convolution and node.args[1].op == "get_attr" and node.args[8] == 1 and not node.args[6]:  # type: ignore
        x, weight, bias, *options = node.args[:6]
        shape = tuple(tuple(option) for option in options)  # type: ignore[arg-type]
        return _Layer(node, x, attribute(gm, str(weight.target)), shape, bias is not None)  # type: ignore
    return None


def _weight_path(node: fx.Node) -> str:
    return f"{node.target}.weight" if node.op == "call_module" else str(node.args[1].target)  # type: ignore[union-attr]
