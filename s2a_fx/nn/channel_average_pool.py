"""Channel Average Pooling: shrink a feature's channels without a parameter; the paper's equation (5)."""

from typing import Literal

import torch
from torch import nn

from s2a_fx.errors import ShapeError


class ChannelAveragePool(nn.Module):
    """Average each `reduction` neighbouring channels, eq. (5), and lay the result out as a map (B, C / r, H, W).

    The gradient needs the gradient of the output and `reduction` alone: no activation is kept.

    Args:
        name: of the place it stands at, for errors.
        order: how the input is laid out: `BNC`, `BHWC` or `BCHW`.
        grid: (H, W) of the map; tokens are cut into it.
        prefix: tokens before the grid, which are left out.
        reduction: r; divides C.
    """

    def __init__(
        self, name: str, order: Literal["BNC", "BHWC", "BCHW"], grid: tuple[int, int], prefix: int, reduction: int
    ) -> None:
        super().__init__()
        self.name, self.order, self.grid, self.prefix, self.reduction = name, order, grid, prefix, reduction

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From (B, N, C), (B, H, W, C) or (B, C, H, W) to (B, C / r, H, W)."""
        height, width = self.grid
        positions = tuple(x.shape[2:] if self.order == "BCHW" else x.shape[1:-1])
        wanted = (self.prefix + height * width,) if self.order == "BNC" else self.grid
        if positions != wanted:
            raise ShapeError(
                f"{self.name}: side branch was built for {'x'.join(map(str, wanted))} positions, "
                f"got {'x'.join(map(str, positions))}; call transform() with inputs of the size you train on."
            )
        return self.inference_form(x)

    def inference_form(self, x: torch.Tensor) -> torch.Tensor:
        if self.order == "BCHW":
            return x.unflatten(1, (-1, self.reduction)).mean(2)
        pooled = x.unflatten(-1, (-1, self.reduction)).mean(-1)
        if self.order == "BNC":
            pooled = pooled[:, self.prefix :].unflatten(1, self.grid)
        return pooled.permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        return f"{self.order}, grid={self.grid}, prefix={self.prefix}, reduction={self.reduction}"
