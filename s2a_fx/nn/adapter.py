"""The bottleneck adapter; Houlsby et al., Parameter-Efficient Transfer Learning for NLP (2019); the paper's eq. (13)."""

from typing import Any

import torch
from torch import nn


class Adapter(nn.Module):
    """`x + up(gelu(down(x)))`; `up` is 0 at the start, so that x is at first unchanged. Keeps x and both narrow tensors.

    Args:
        channels: C of x.
        width: of the bottleneck.
        convolutional: x is a map (B, C, H, W) and the layers are 1x1 convolutions; otherwise channels are x's last dimension.
        device, dtype: of the parameters.
    """

    def __init__(self, channels: int, width: int, convolutional: bool, **factory: Any) -> None:
        super().__init__()
        self.down = _layer(channels, width, convolutional, factory)
        self.act = nn.GELU()
        self.up = _layer(width, channels, convolutional, factory)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.up(self.act(self.down(x)))


def _layer(source: int, target: int, convolutional: bool, factory: dict[str, Any]) -> nn.Linear | nn.Conv2d:
    return nn.Conv2d(source, target, 1, **factory) if convolutional else nn.Linear(source, target, **factory)
