"""Add a matrix of low rank that stands beside a layer to the layer's weight.

    before  layer(x) + B(A(x)) * scale      three products, LoRA's form while it trains
    after   layer(x)                        its weight W + scale B A

Leaves alone: layers whose output is read elsewhere, too; weights with a reader that goes without; A and B with biases.
"""

from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn

from s2a_fx.graph.calls import call_of
from s2a_fx.graph.flow import attribute, eliminate_dead_code
from s2a_fx.nn.ghost import can_be_ghost

_LAYERS = (F.linear, F.conv1d, F.conv2d, F.conv3d)
_POINTWISE = ((), ((1, 1), (0, 0), (1, 1)))  # strides, padding and dilation of B: of a linear layer, of a 1x1 convolution


@dataclass(frozen=True)
class _Layer:
    """A linear layer or convolution of one group: what it reads, its weight and where that is, its strides and the like."""

    x: fx.Node
    path: str
    weight: torch.Tensor
    options: tuple[tuple[int, ...], ...]
    has_bias: bool


@dataclass(frozen=True)
class _Beside:
    """A layer's call, its sum with what stands beside it, and the weights that are beside it."""

    call: fx.Node
    total: fx.Node
    layer: _Layer
    down: _Layer
    up: _Layer
    scale: float

    def alike(self) -> tuple[str, str, float]:
        return self.down.path, self.up.path, self.scale


def merge_low_rank(gm: fx.GraphModule) -> None:
    """Merge wherever it is exact, into new weights; the old tensors stay as they are."""
    merged: dict[str, list[_Beside]] = {}
    for node in gm.graph.nodes:
        if (beside := _beside(gm, node)) is not None:
            merged.setdefault(beside.layer.path, []).append(beside)
    readers = _weight_readers(gm)
    for path, group in merged.items():
        if len(group) == readers[path] and len({beside.alike() for beside in group}) == 1:
            _merge(gm, path, group)
    eliminate_dead_code(gm)


def _weight_readers(gm: fx.GraphModule) -> Counter[str]:
    """How many nodes read each weight."""
    readers: Counter[str] = Counter()
    for node in gm.graph.nodes:
        if node.op == "call_module":
            readers[f"{node.target}.weight"] += 1
        elif node.op == "get_attr":
            readers[str(node.target)] += len(node.users)
    return readers


def _merge(gm: fx.GraphModule, path: str, group: list[_Beside]) -> None:
    first = group[0]
    weight = first.layer.weight
    precision = torch.promote_types(weight.dtype, torch.float32)
    up, down = (layer.weight.flatten(1).to(precision) for layer in (first.up, first.down))
    added = (up @ down).view(weight.shape) * first.scale
    owner, _, name = path.rpartition(".")
    setattr(gm.get_submodule(owner), name, nn.Parameter((weight + added).to(weight.dtype), requires_grad=False))
    for beside in group:
        beside.total.replace_all_uses_with(beside.call)


def _beside(gm: fx.GraphModule, node: fx.Node) -> _Beside | None:
    add = call_of(gm, node)
    if add is None or add.operator is not torch.add or add.in_place or len(add.nodes) != 2 or add.options["alpha"] != 1:
        return None
    for call, term in (add.nodes, add.nodes[::-1]):
        scale, added = _unscaled(gm, term)
        layer, up = _layer(gm, call), _layer(gm, added)
        down = _layer(gm, up.x) if up is not None else None
        if layer is None or up is None or down is None or any(len(n.users) != 1 for n in (call, term, added, up.x)):
            continue
        if down.x is layer.x and _fits(layer, down, up):
            return _Beside(call, node, layer, down, up, scale)
    return None


def _unscaled(gm: fx.GraphModule, term: fx.Node) -> tuple[float, fx.Node]:
    call = call_of(gm, term)
    scale = call.options.get("other") if call is not None and call.operator is torch.mul and not call.in_place else None
    return (float(scale), call.input) if call is not None and isinstance(scale, int | float) else (1.0, term)


def _fits(layer: _Layer, down: _Layer, up: _Layer) -> bool:
    """Whether B A is a layer of the same kind, without a bias."""
    pointwise = up.options in _POINTWISE and all(n == 1 for n in up.weight.shape[2:])
    shape = (up.weight.shape[0], *down.weight.shape[1:])
    return layer.options == down.options and pointwise and layer.weight.shape == shape and not (down.has_bias or up.has_bias)


def _layer(gm: fx.GraphModule, node: fx.Node) -> _Layer | None:
    call = call_of(gm, node)
    path = call.path_of("weight") if call is not None and call.operator in _LAYERS else None
    if call is None or path is None or (node.op == "call_module" and not can_be_ghost(gm.get_submodule(str(node.target)))):
        return None
    names = () if call.operator is F.linear else ("stride", "padding", "dilation")
    options = tuple(call.options[name] for name in names)
    if call.options.get("groups", 1) != 1 or not all(isinstance(option, tuple) for option in options):
        return None
    return _Layer(call.input, path, attribute(gm, path), options, "bias" in call.operands)
