"""LoRA: a low-rank matrix beside a frozen one; Hu et al., LoRA (2021); the paper's eq. (15)."""

import math
from typing import Any

import torch
from torch import nn


class LoRA(nn.Module):
    """`y + scale * B(A(x))` for a layer's input x and output y; B is 0 at the start, so that y is at first unchanged.

    A keeps x for its gradient, and B what A makes of it.

    Args:
        layer: a linear layer, or a convolution of one group: A is one like it with `rank` outputs, B a 1x1 convolution.
        rank: of B A.
        scale: of what is added; the papers' alpha / rank.
        device, dtype: of A and B.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int, scale: float, **factory: Any) -> None:
        super().__init__()
        self.scale = scale
        if isinstance(layer, nn.Linear):
            self.A: nn.Module = nn.Linear(layer.in_features, rank, bias=False, **factory)
            self.B: nn.Module = nn.Linear(rank, layer.out_features, bias=False, **factory)
        else:
            shape: dict[str, Any] = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
            self.A = nn.Conv2d(layer.in_channels, rank, layer.kernel_size, bias=False, **shape, **factory)  # type: ignore[arg-type]
            self.B = nn.Conv2d(rank, layer.out_channels, 1, bias=False, **factory)
        nn.init.kaiming_uniform_(self.A.weight, a=math.sqrt(5))  # type: ignore[arg-type]
        nn.init.zeros_(self.B.weight)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        added = self.B(self.A(x))
        return y + (added if self.scale == 1 else added * self.scale)
