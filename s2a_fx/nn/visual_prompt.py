"""Visual prompts: learned tokens, or a learned border, that a block reads beside its input.

Jia et al., Visual Prompt Tuning (2022), the deep form: every block has its own, and what it makes of them is dropped.
"""

import math
from typing import Any, Literal

import torch
from torch import nn

from s2a_fx.errors import ShapeError


def _uniform(tensor: torch.Tensor, channels: int) -> nn.Parameter:
    """VPT's own bound for ViTs, Xavier's for a projection of 16 x 16 patches of three colours; here for all backbones."""
    bound = math.sqrt(6 / (3 * 16 * 16 + channels))
    return nn.Parameter(tensor.uniform_(-bound, bound))


def _for_each(x: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """The prompt once for each image of x, which has one dimension more; no memory of its own."""
    place = (slice(None), *[slice(1)] * prompt.ndim)
    return prompt.expand_as(x[place].expand(-1, *prompt.shape))


class PromptTokens(nn.Module):
    """From (B, N, C) to (B, N + tokens, C): learned tokens after the first `prefix` ones. Keeps nothing."""

    def __init__(self, tokens: int, channels: int, prefix: int = 0, **factory: Any) -> None:
        super().__init__()
        self.prefix = prefix
        self.tokens = _uniform(torch.empty(tokens, channels, **factory), channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inference_form(x)

    def inference_form(self, x: torch.Tensor) -> torch.Tensor:
        tokens = _for_each(x, self.tokens)
        parts = [x[:, : self.prefix], tokens, x[:, self.prefix :]] if self.prefix else [tokens, x]
        return torch.cat(parts, 1)

    def extra_repr(self) -> str:
        return f"tokens={self.tokens.shape[0]}, channels={self.tokens.shape[1]}, prefix={self.prefix}"


class PromptBorder(nn.Module):
    """A learned border, one position wide, around a map: from H x W to (H + 2) x (W + 2). Keeps nothing.

    Args:
        name: of the place it stands at, for errors.
        order: `BCHW` or `BHWC`.
        grid: (H, W).
        channels: C.
    """

    def __init__(self, name: str, order: Literal["BCHW", "BHWC"], grid: tuple[int, int], channels: int, **factory: Any) -> None:
        super().__init__()
        self.name, self.order, self.grid = name, order, grid
        height, width = grid
        self.rows = _uniform(torch.empty(2, *self._shape(channels, 1, width + 2), **factory), channels)
        self.columns = _uniform(torch.empty(2, *self._shape(channels, height, 1), **factory), channels)

    def _shape(self, channels: int, height: int, width: int) -> tuple[int, int, int]:
        return (channels, height, width) if self.order == "BCHW" else (height, width, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        down, across = self._dims()
        if (x.shape[down], x.shape[across]) != self.grid:
            raise ShapeError(
                f"{self.name}: the prompt's border was built for {self.grid[0]}x{self.grid[1]} positions, got "
                f"{x.shape[down]}x{x.shape[across]}; call transform() with inputs of the size you train on."
            )
        return self.inference_form(x)

    def inference_form(self, x: torch.Tensor) -> torch.Tensor:
        down, across = self._dims()
        top, bottom, left, right = (_for_each(x, side) for side in (*self.rows.unbind(), *self.columns.unbind()))
        return torch.cat((top, torch.cat((left, x, right), across), bottom), down)

    def _dims(self) -> tuple[int, int]:
        return (2, 3) if self.order == "BCHW" else (1, 2)

    def extra_repr(self) -> str:
        return f"{self.order}, grid={self.grid}"
