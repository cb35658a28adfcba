"""Kernels around a normalized row x_hat = (x - mean) * rstd, kept as codes.

Layer norm's backward needs x_hat and rstd even where its weight is frozen:

    grad_x = rstd * (g - mean(g) - x_hat * mean(g * x_hat)),  g = grad_y * weight

and so do a linear layer and a GELU after it: their input is x_hat * weight + bias. RMS norm is the same without the means
(`centered` False). Shapes: x and its kin (rows, width); mean and rstd (rows, 1); weight and bias (1, width).

`group` neighbours in a row share a range: one range a row where it is the width. What is coded is x_hat - shift, (1, width):
trained networks have channels far from 0 in every token, which would widen the range of all.
"""

import torch

from s2a_fx.codecs.rows import dequantize, quantize
from s2a_fx.fusion import fused


@fused
def normalize_encode(
    x: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor, shift: torch.Tensor, bits: int, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes of x_hat, (rows, width * bits / 8), and their ranges, (rows, 2 * width / group)."""
    x_hat = (x.float() - mean) * rstd - shift
    rows, groups = x.shape[0], x.shape[1] // group
    packed, ranges = quantize(x_hat.reshape(rows * groups, group), bits)
    return packed.reshape(rows, x.shape[1] * bits // 8), ranges.reshape(rows, 2 * groups)


@fused
def channel_means(x: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor) -> torch.Tensor:
    """The mean of x_hat in each channel, (1, width)."""
    return ((x.float() - mean) * rstd).mean(0, keepdim=True)


def _decoded(packed: torch.Tensor, ranges: torch.Tensor, shift: torch.Tensor, bits: int) -> torch.Tensor:
    rows, groups = packed.shape[0], ranges.shape[1] // 2
    coded = packed.reshape(rows * groups, packed.shape[1] // groups), ranges.reshape(rows * groups, 2)
    return dequantize(*coded, bits).reshape(rows, shift.shape[1]) + shift


@fused
def normalize_decode(
    packed: torch.Tensor,
    ranges: torch.Tensor,
    shift: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    bits: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """x_hat * weight + bias."""
    return (_decoded(packed, ranges, shift, bits) * weight.float() + bias.float()).to(dtype)


@fused
def normalize_backward(
    grad: torch.Tensor,
    packed: torch.Tensor,
    ranges: torch.Tensor,
    shift: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    bits: int,
    centered: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """grad_x from grad_y."""
    x_hat = _decoded(packed, ranges, shift, bits)
    g = grad.float() * weight.float()
    along = (g * x_hat).mean(1, keepdim=True)
    if centered:
        g = g - g.mean(1, keepdim=True)
    return ((g - x_hat * along) * rstd).to(dtype)


def normalized(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, centered: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Layer norm (`centered`) or RMS norm over the last dimension by torch's own kernel; mean and 1 / sigma, float32 (rows, 1)."""
    width = x.shape[-1]
    if centered:
        y, mean, rstd = torch.native_layer_norm(x, (width,), weight, bias, eps)
        return y, mean.reshape(-1, 1).float(), rstd.reshape(-1, 1).float()
    y = torch.nn.functional.rms_norm(x, (width,), weight, eps)
    rstd = x.reshape(-1, width).float().square().mean(1, keepdim=True).add_(eps).rsqrt_()
    return y, torch.zeros_like(rstd), rstd
