"""LST: a side network of the frozen one's structure, its layers r times narrower, that climbs beside it.

Sung et al., LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning (2022). Each side layer reads a gated sum
of the side layer before it and the frozen layer beside it; no gradient flows through the frozen network. The authors also start
the side network from pruned weights of the frozen one; here it starts at random.
"""

from typing import Any

import torch
from timm.models.convnext import ConvNeXtBlock
from timm.models.vision_transformer import Block
from torch import nn

_TEMPERATURE = 0.1
_HEAD = 32  # channels of an attention's head


class LadderLayer(nn.Module):
    """`layer(g * side + (1 - g) * down(frozen))`, g = sigmoid(gate / 0.1), half and half at the start.

    Tokens (B, N, C) have a transformer block for a layer, maps a ConvNeXt block.

    Args:
        order: of the frozen feature: `BNC`, `BHWC` or `BCHW`; the side's is `BNC` or `BCHW`.
        channels: C of the frozen feature.
        width: C / r, of the side.
        device, dtype: of the parameters.
    """

    def __init__(self, order: str, channels: int, width: int, **factory: Any) -> None:
        super().__init__()
        self.order = order
        self.gate = nn.Parameter(torch.zeros(1, **factory))
        self.down = _narrowing(order, channels, width, factory)
        if order == "BNC":
            heads = width // _HEAD if width % _HEAD == 0 else 1
            self.layer = _built(factory, Block, width, heads, qkv_bias=True)
        else:
            self.layer = _built(factory, ConvNeXtBlock, width, ls_init_value=None)

    def forward(self, side: torch.Tensor, frozen: torch.Tensor) -> torch.Tensor:
        if self.order == "BHWC":
            frozen = frozen.permute(0, 3, 1, 2)
        gate = torch.sigmoid(self.gate / _TEMPERATURE)
        return self.layer(gate * side + (1 - gate) * self.down(frozen))  # type: ignore[no-any-return]


def _narrowing(order: str, channels: int, width: int, factory: dict[str, Any]) -> nn.Module:
    if order == "BNC":
        return nn.Linear(channels, width, bias=False, **factory)
    return nn.Conv2d(channels, width, 1, bias=False, **factory)


def _built(factory: dict[str, Any], kind: type[nn.Module], *args: Any, **options: Any) -> nn.Module:
    with torch.device(factory.get("device") or "cpu"):  # timm's blocks take no device before 1.0.21
        return kind(*args, **options).to(factory.get("dtype"))


class LadderStart(nn.Module):
    """The first side feature: the frozen network's embedding, narrowed by a layer."""

    def __init__(self, order: str, channels: int, width: int, **factory: Any) -> None:
        super().__init__()
        self.order = order
        tokens = order == "BNC"
        self.down = (
            nn.Linear(channels, width, bias=False, **factory) if tokens else nn.Conv2d(channels, width, 1, bias=False, **factory)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(x.permute(0, 3, 1, 2) if self.order == "BHWC" else x)  # type: ignore[no-any-return]


class LadderTop(nn.Module):
    """From the last side feature to what the head reads, laid out in the frozen network's `order`: a norm and a layer."""

    def __init__(self, order: str, width: int, channels: int, **factory: Any) -> None:
        super().__init__()
        self.order = order
        self.norm = nn.LayerNorm(width, **factory)
        self.up = nn.Linear(width, channels, **factory)

    def forward(self, side: torch.Tensor) -> torch.Tensor:
        if self.order == "BNC":
            return self.up(self.norm(side))  # type: ignore[no-any-return]
        out = self.up(self.norm(side.permute(0, 2, 3, 1)))
        return out.permute(0, 3, 1, 2) if self.order == "BCHW" else out  # type: ignore[no-any-return]
