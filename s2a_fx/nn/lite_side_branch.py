"""Lite Side Branch: the light blocks that run beside the backbone; the paper's equation (6)."""

from typing import Literal

import torch
from torch import nn


class TapScale(nn.Module):
    """Bring each image's map, (B, C, H, W), to a root mean square of `RMS`.

    Backbones' features have root mean squares from .02 to 3. Without this, larger ones drown what the branch has computed, and its
    gradient dies out within a few blocks; smaller ones are drowned by it. A half leaves a gradient to the first of 36 blocks.
    The divisor counts as constant in the backward, so that it alone is kept: four bytes an image.
    """

    RMS = 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self._factor(x.detach())

    def inference_form(self, x: torch.Tensor) -> torch.Tensor:
        return x * self._factor(x)

    def _factor(self, x: torch.Tensor) -> torch.Tensor:
        square = x.float().square().mean((1, 2, 3), keepdim=True)
        return (self.RMS * square.clamp_min(1e-8).rsqrt()).to(x.dtype)


class LiteSideBlock(nn.Sequential):
    """`y = PW(DW(PW(x)))`, eq. (6), a normalization and a ReLU after each of the first two convolutions.

    Input and output are maps (B, channels, H, W). The paper leaves normalization and activation open. GroupNorm over one group
    does not depend on the batch, so that small batches, gradient accumulation and eval mode see the same function; ReLU's output
    is the next convolution's input, which is kept anyway, so that it costs no memory. The output begins with a variance of about 1.
    """

    def __init__(self, channels: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        factory = {"device": device, "dtype": dtype}
        super().__init__()
        self.expand = nn.Conv2d(channels, channels, 1, **factory)  # type: ignore[arg-type]
        self.norm1 = nn.GroupNorm(1, channels, **factory)  # type: ignore[arg-type]
        self.act1 = nn.ReLU()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, **factory)  # type: ignore[arg-type]
        self.norm2 = nn.GroupNorm(1, channels, **factory)  # type: ignore[arg-type]
        self.act2 = nn.ReLU()
        self.project = nn.Conv2d(channels, channels, 1, **factory)  # type: ignore[arg-type]
        _keep_variance(self.project, "relu")


class SideTransition(nn.Sequential):
    """Carry the side branch into the next stage: from (B, C, H, W) to (B, C', H', W').

    A convolution whose kernel and stride are the ratio of the sizes (2x2, stride 2, between the stages of the usual backbones).
    Sizes that do not divide are pooled first, and the convolution is 1x1.
    """

    def __init__(
        self,
        channels: tuple[int, int],
        source: tuple[int, int],
        target: tuple[int, int],
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        ratio = source[0] // target[0], source[1] // target[1]
        divides = all(r >= 1 and t * r == s for s, t, r in zip(source, target, ratio, strict=True))
        if not divides:
            self.pool = nn.AdaptiveAvgPool2d(target)
            ratio = (1, 1)
        self.conv = nn.Conv2d(*channels, ratio, stride=ratio, device=device, dtype=dtype)
        _keep_variance(self.conv, "linear")


def _keep_variance(convolution: nn.Conv2d, before: Literal["linear", "relu"]) -> None:
    """Begin with an output of the variance of what stands `before`: torch's default weights shrink it to a third or less."""
    nn.init.kaiming_normal_(convolution.weight, nonlinearity=before)
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)
