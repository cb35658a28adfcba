"""Where the channels of a feature stand, and the grid of its tokens."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import fx, nn

from s2a_fx.graph.calls import Call, call_of
from s2a_fx.graph.torch_internals import BatchNorm, Convolution

Order = Literal["BHWC", "BCHW"]

_SECOND_MODULES = (Convolution, BatchNorm, nn.GroupNorm, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
_LAST_MODULES = (nn.Linear, nn.LayerNorm)
_SECOND_FUNCTIONS = (F.conv2d, F.batch_norm, F.group_norm, F.avg_pool2d, F.max_pool2d, F.adaptive_avg_pool2d, F.interpolate)
_LAST_FUNCTIONS = (F.linear, F.layer_norm)
_TO_LAST, _TO_SECOND = (0, 2, 3, 1), (0, 3, 1, 2)
_POOLED: dict[tuple[int, ...], Order] = {(2, 3): "BCHW", (1, 2): "BHWC"}
_SEARCH_LIMIT = 200


@dataclass(frozen=True)
class Layout:
    """How a feature is laid out.

    Attributes:
        order: `BNC` for tokens, `BHWC` or `BCHW` for maps.
        channels: C.
        height, width: of the map; for tokens, of the grid that they were cut from.
        prefix: tokens before the grid (class token, registers); 0 for maps.
    """

    order: Literal["BNC", "BHWC", "BCHW"]
    channels: int
    height: int
    width: int
    prefix: int = 0

    @property
    def tokens(self) -> int:
        """Positions of the feature: prefix tokens and grid, or height times width."""
        return self.prefix + self.height * self.width


def layout_of(gm: fx.GraphModule, node: fx.Node) -> Layout | None:
    """The layout of a node's value; None for a shape or a neighbourhood that tells nothing.

    Three dimensions are tokens: their grid is the nearest map above them that fits, or else square. Of four dimensions the
    first layer below that has channels tells where they stand.
    """
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return None
    if value.ndim == 3:
        return _token_layout(gm, node, value)
    if value.ndim != 4:
        return None
    order = _order(gm, node, below=True) or _order(gm, node, below=False)
    if order == "BCHW":
        _, c, h, w = value.shape
        return Layout("BCHW", c, h, w)
    if order == "BHWC":
        _, h, w, c = value.shape
        return Layout("BHWC", c, h, w)
    return None


def _token_layout(gm: fx.GraphModule, node: fx.Node, value: torch.Tensor) -> Layout:
    _, tokens, channels = value.shape
    for h, w in _convolved_grids_above(gm, node):
        if h * w <= tokens < h * w + min(h * w, 64):
            return Layout("BNC", channels, h, w, tokens - h * w)
    side = int(tokens**0.5)
    return Layout("BNC", channels, side, side, tokens - side * side)


def _convolved_grids_above(gm: fx.GraphModule, node: fx.Node) -> list[tuple[int, int]]:
    """Heights and widths of the convolutions' outputs above a node, nearest first."""
    found: list[tuple[int, int]] = []
    for above in _breadth_first(node, below=False):
        value = above.meta.get("val")
        if isinstance(value, torch.Tensor) and value.ndim == 4 and _order_told_by(gm, above, below=False) == "BCHW":
            found.append((value.shape[2], value.shape[3]))
    return found


def _order(gm: fx.GraphModule, node: fx.Node, below: bool) -> Order | None:
    """The order told by the nearest layer below (which takes the value) or above (which makes it)."""
    if not below and (told := _order_told_by(gm, node, below)):
        return told
    for count, other in enumerate(_breadth_first(node, below)):
        if told := _order_told_by(gm, other, below):
            return told
        if count > _SEARCH_LIMIT:
            break
    return None


def _is_map(node: fx.Node) -> bool:
    """Whether the value has four dimensions; below a map that was flattened or transposed, layers tell nothing of it."""
    value = node.meta.get("val")
    return not isinstance(value, torch.Tensor) or value.ndim == 4


def _breadth_first(node: fx.Node, below: bool) -> Iterator[fx.Node]:
    seen = {node}
    queue = deque([node])
    while queue:
        current = queue.popleft()
        if below and not _is_map(current):
            continue
        for other in current.users if below else current.all_input_nodes:
            if other not in seen:
                seen.add(other)
                queue.append(other)
                yield other


def _dimensions(call: Call) -> tuple[int, ...]:
    """The dimensions that a mean is taken over, counted from the front of four."""
    dims = call.options.get("dim")
    given = dims if isinstance(dims, tuple) else (dims,)
    return tuple(sorted(d % 4 for d in given if isinstance(d, int)))


def _order_told_by(gm: fx.GraphModule, node: fx.Node, below: bool) -> Order | None:
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        if isinstance(module, _SECOND_MODULES):
            return "BCHW"
        return "BHWC" if isinstance(module, _LAST_MODULES) else None
    call = call_of(gm, node)
    if call is None:
        return None
    if call.operator in _SECOND_FUNCTIONS:
        return "BCHW"
    if below and call.operator is torch.mean:
        return _POOLED.get(_dimensions(call))
    if call.operator in _LAST_FUNCTIONS:
        return "BHWC"
    if call.operator is torch.permute:
        if call.options["dims"] == _TO_LAST:
            return "BCHW" if below else "BHWC"
        if call.options["dims"] == _TO_SECOND:
            return "BHWC" if below else "BCHW"
    return None
