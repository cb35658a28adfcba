"""UniPT: a light network in parallel to a frozen one, of which it reads a few features.

Diao et al., Universal Parallel Tuning for Transfer Learning with Efficient Parameter and Memory (2024). The last feature, the
anchor, asks: every earlier one is brought to its size and mixed by its likeness to it (parallel interaction), and all are summed by
confidences that are learned (confidence aggregation). No gradient flows through the frozen network.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

_EPSILON = 1e-8


class Feature(NamedTuple):
    """How a feature is laid out: `BNC`, or a map, `BCHW` or `BHWC`, of `grid` (H, W); `channels` C."""

    order: Literal["BNC", "BHWC", "BCHW"]
    channels: int
    grid: tuple[int, int]


class ParallelNetwork(nn.Module):
    """From the anchor and the features before it to what the head reads in the anchor's place, laid out like it.

    Args:
        anchor: the layout of the last feature.
        taps: those of the others; of tokens as many as the anchor has, maps of a grid that the anchor's divides.
        width: m, of the network.
        device, dtype: of the parameters.
    """

    def __init__(self, anchor: Feature, taps: Sequence[Feature], width: int, **factory: Any) -> None:
        super().__init__()
        self.anchor, self.taps = anchor, tuple(taps)
        tokens = anchor.order == "BNC"
        reduced = [_Reduced(tap, anchor, width, factory) for tap in (*taps, anchor)]
        self.taps_reduced, self.anchor_reduced = nn.ModuleList(reduced[:-1]), reduced[-1]
        self.projection = _layer(width, width, tokens, factory)
        self.projection_norm = _norm(width, tokens, factory)
        self.act = nn.ReLU()
        self.up = _layer(width, anchor.channels, tokens, factory)
        self.gate = nn.Linear(width, 1, **factory)

    def forward(self, anchor: torch.Tensor, *taps: torch.Tensor) -> torch.Tensor:
        anchor = _as_map(anchor, self.anchor.order)
        reduced = self.anchor_reduced(anchor, anchor)
        query = _tokens(reduced, self.anchor.order)
        merged, confidences = [], []
        for tap, layout, reduce in zip(taps, self.taps, self.taps_reduced, strict=True):
            context = _tokens(reduce(_as_map(tap, layout.order), anchor), self.anchor.order)
            likeness = self.act(query @ context.transpose(1, 2))
            merged.append((likeness / (likeness.sum(-1, keepdim=True) + _EPSILON)) @ context + context)
            confidences.append(self.gate(query.mean(1) * context.mean(1)))
        weights = torch.cat(confidences, 1).softmax(1)
        total = (torch.stack(merged, 1) * weights[:, :, None, None]).sum(1)
        if self.anchor.order != "BNC":
            total = total.transpose(1, 2).unflatten(2, self.anchor.grid)
        out = self.up(self.act(reduced + self.projection_norm(self.projection(total))))
        return out.permute(0, 2, 3, 1) if self.anchor.order == "BHWC" else out


class _Reduced(nn.Module):
    """A feature at the anchor's size and the network's width: tokens by a layer alone, maps summed by weights over each cell."""

    def __init__(self, tap: Feature, anchor: Feature, width: int, factory: dict[str, Any]) -> None:
        super().__init__()
        tokens = anchor.order == "BNC"
        self.cell = tap.grid[0] // anchor.grid[0], tap.grid[1] // anchor.grid[1]
        self.summed = not tokens and self.cell != (1, 1)
        if self.summed:
            self.identity = _layer(anchor.channels, tap.channels, tokens, factory)
            self.act = nn.ReLU()
        self.down = _layer(tap.channels, width, tokens, factory)
        self.norm = _norm(width, tokens, factory)

    def forward(self, x: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        if self.summed:
            rows, columns = self.cell
            cells = x.unflatten(3, (-1, columns)).unflatten(2, (-1, rows))  # (B, C, H, rows, W, columns)
            asked = self.act(self.identity(anchor)).unsqueeze(3).unsqueeze(5)
            weights = self.act((asked * cells).sum(1, keepdim=True))
            weights = weights / (weights.sum((3, 5), keepdim=True) + _EPSILON) + 1 / (rows * columns)
            x = (weights * cells).sum((3, 5))
        return self.norm(self.down(x))  # type: ignore[no-any-return]


def _layer(source: int, target: int, tokens: bool, factory: dict[str, Any]) -> nn.Linear | nn.Conv2d:
    return nn.Linear(source, target, **factory) if tokens else nn.Conv2d(source, target, 1, **factory)


def _norm(width: int, tokens: bool, factory: dict[str, Any]) -> nn.LayerNorm | nn.BatchNorm2d:
    return nn.LayerNorm(width, **factory) if tokens else nn.BatchNorm2d(width, **factory)


def _as_map(x: torch.Tensor, order: str) -> torch.Tensor:
    return x.permute(0, 3, 1, 2) if order == "BHWC" else x


def _tokens(x: torch.Tensor, order: str) -> torch.Tensor:
    return x if order == "BNC" else x.flatten(2).transpose(1, 2)
