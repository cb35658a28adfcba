"""Where the channels of a feature stand, and the grid of its tokens."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import fx

from s2a_fx.graph.calls import call_of, operator_of

Order = Literal["BHWC", "BCHW"]

_CHANNELS_SECOND = (
    F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.batch_norm, F.group_norm,
    F.avg_pool2d, F.max_pool2d, F.adaptive_avg_pool2d, F.interpolate,
)  # fmt: skip
_CHANNELS_LAST = (F.linear, F.layer_norm)
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


def _order_told_by(gm: fx.GraphModule, node: fx.Node, below: bool) -> Order | None:
    operator, call = operator_of(gm, node), call_of(gm, node)
    if operator in _CHANNELS_SECOND:
        return "BCHW"
    if operator in _CHANNELS_LAST:
        return "BHWC"
    if below and call is not None and operator is torch.mean:
        return _POOLED.get(tuple(sorted(_of_four(call.options.get("dim")))))
    if call is not None and operator is torch.permute:
        dims = _of_four(call.options["dims"])
        if dims == _TO_LAST:
            return "BCHW" if below else "BHWC"
        if dims == _TO_SECOND:
            return "BHWC" if below else "BCHW"
    return None


def _of_four(dims: int | tuple[int, ...] | None) -> tuple[int, ...]:
    """Dimensions counted from the front of four."""
    return tuple(dim % 4 for dim in (dims if isinstance(dims, tuple) else () if dims is None else (dims,)))
