"""Low-Rank Prompt: add a learnable matrix of low rank to a feature; the paper's equations (3) and (4)."""

import math
from typing import Literal

import torch
from torch import nn

from s2a_fx.errors import ShapeError


class LowRankPrompt(nn.Module):
    """`y = x + A B`, eq. (3), with A (N, r) zero and B (r, C) normal at the start: at first `y = x`.

    Its gradients need A, B and the gradient of y alone, eq. (4): no activation is kept.

    Args:
        name: of the place it stands at, for errors.
        order: `BNC` for tokens, `BHWC` or `BCHW` for maps.
        grid: the positions: (N,) for tokens, (H, W) for maps.
        channels: C.
        rank: r.
        std: of B's entries.
        cells: how many cells a map is cut into in height and in width, whose positions share a row of A; None: a row a position.
        device, dtype: of A and B.
    """

    def __init__(
        self,
        name: str,
        order: Literal["BNC", "BHWC", "BCHW"],
        grid: tuple[int, ...],
        channels: int,
        rank: int,
        std: float = 0.02,
        cells: tuple[int, int] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.name, self.order, self.grid, self.channels = name, order, grid, channels
        self.cells = cells
        self.A = nn.Parameter(torch.zeros(math.prod(cells or grid), rank, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.empty(rank, channels, device=device, dtype=dtype).normal_(std=std))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From (B, N, C), (B, H, W, C) or (B, C, H, W) to the same shape."""
        prompt = self._prompt()
        if x.shape[1:] != prompt.shape:
            raise ShapeError(
                f"{self.name}: prompt was built for {self._difference(prompt.shape, x.shape[1:])}; "
                "call transform() with inputs of the size you train on."
            )
        return x + prompt

    def inference_form(self, x: torch.Tensor) -> torch.Tensor:
        return x + self._prompt().contiguous()

    def _prompt(self) -> torch.Tensor:
        """A B, laid out as x is, without the batch."""
        prompt = torch.matmul(self.A, self.B)
        prompt = prompt.unflatten(0, self.grid) if self.cells is None else self._spread(prompt.unflatten(0, self.cells))
        return prompt.permute(2, 0, 1) if self.order == "BCHW" else prompt

    def _spread(self, prompt: torch.Tensor) -> torch.Tensor:
        """From a prompt for each cell to one for each position."""
        assert self.cells is not None
        (height, width), (down, across) = self.grid, self.cells
        wide = prompt[:, None, :, None].expand(down, height // down, across, width // across, -1)
        return wide.reshape(height, width, -1)

    def _difference(self, built: torch.Size, got: torch.Size) -> str:
        if self.order == "BNC" and len(got) == 2 and got[1] == built[1]:
            return f"{built[0]} tokens, got {got[0]}"
        return f"shape {tuple(built)} without the batch, got {tuple(got)}"

    def extra_repr(self) -> str:
        cells = f", cells={self.cells}" if self.cells else ""
        return f"{self.order}, grid={self.grid}, channels={self.channels}, rank={self.A.shape[1]}{cells}"
