"""Kernels around a normalized row x_hat = (x - mean) * rstd, kept as codes.

Layer norm's backward needs x_hat and rstd even where its weight is frozen:

    grad_x = rstd * (g - mean(g) - x_hat * mean(g * x_hat)),  g = grad_y * weight

and so do a linear layer and a GELU after it: their input is x_hat * weight + bias. RMS norm is the same without the means
(`centered` False). Shapes: x and its kin (rows, width); mean and rstd (rows, 1); weight and bias (1, width).
"""

import torch

from s2a_fx.codecs.rows import dequantize, quantize
from s2a_fx.ops.fusion import fused


@fused
def normalize_encode(x: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes of x_hat and their ranges."""
    return quantize((x.float() - mean) * rstd, bits)


@fused
def normalize_decode(
    packed: torch.Tensor, ranges: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, bits: int, dtype: torch.dtype
) -> torch.Tensor:
    """x_hat * weight + bias."""
    return (dequantize(packed, ranges, bits) * weight.float() + bias.float()).to(dtype)


@fused
def normalize_backward(
    grad: torch.Tensor,
    packed: torch.Tensor,
    ranges: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    bits: int,
    centered: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """grad_x from grad_y."""
    x_hat = dequantize(packed, ranges, bits)
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
