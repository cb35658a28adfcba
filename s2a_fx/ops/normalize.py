"""Kernels around a normalized row x_hat = (x - mean) * rstd, kept as codes.

Layer norm's backward needs x_hat and rstd even where its weight is frozen:

    grad_x = rstd * (g - mean(g) - x_hat * mean(g * x_hat)),  g = grad_y * weight

and so do a linear layer and a GELU after it: their input is x_hat * weight + bias. RMS norm is the same without the means
(`centered` False). Shapes: x and its kin (images, rows, width), see `by_image`; mean and rstd (images, rows, 1); weight and bias
(1, width).

`group` neighbours in a row share a range: one range a row where it is the width. What is coded is x_hat less a shift, (images, 1,
width): trained networks have channels far from 0 in every token, which would widen the range of all. The shift is an image's own,
so that no gradient depends on what other images are in the batch, and kept in eighths, int8: what is coded is less just that.
"""

import functools
import operator
from collections.abc import Sequence

import torch

from s2a_fx.codecs.packing import cut
from s2a_fx.codecs.rows import dequantize, quantize
from s2a_fx.fusion import fused

FEW_ROWS = 16  # to an image; a shift would take a quarter of what their codes do
STEP = 0.125  # of a shift, in deviations of x


@fused
def normalize_encode(
    x: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor, shift: torch.Tensor, bits: int, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes of x_hat, (images, rows, width * bits / 8), and their ranges, (images, rows, 2 * width / group)."""
    x_hat = (x.float() - mean) * rstd - shift.float() * STEP
    packed, ranges = quantize(x_hat.unflatten(-1, (-1, group)), bits)
    return packed.flatten(-2), ranges.flatten(-2)


def by_image(x: torch.Tensor) -> torch.Tensor:
    """(images, ..., width) as (images, rows, width), row by row in memory."""
    return x.reshape(-1, 1, x.shape[-1]) if x.ndim < 3 else x.flatten(1, -2).contiguous()


def channel_shift(x: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor) -> torch.Tensor:
    """The mean of x_hat in each channel of an image in steps, int8 (images, 1, width); 0, (images, 1, 1), where rows are few."""
    if x.shape[1] < FEW_ROWS:
        return x.new_zeros(x.shape[0], 1, 1, dtype=torch.int8)
    return channel_means(x, mean, rstd)  # type: ignore[no-any-return]


@fused
def channel_means(x: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor) -> torch.Tensor:
    means = ((x.float() - mean) * rstd).mean(1, keepdim=True)
    return (means / STEP).round().clamp(-127, 127).to(torch.int8)


def _decoded(packed: torch.Tensor, ranges: torch.Tensor, shift: torch.Tensor, bits: int) -> list[torch.Tensor]:
    """x_hat, segment by segment of each group: (images, rows, groups, group / segments)."""
    coded = _grouped(packed, ranges), ranges.unflatten(-1, (-1, 2))
    width = packed.shape[-1] * 8 // bits
    shifts = cut(_grouped((shift.float() * STEP).expand(-1, -1, width), ranges), bits)
    return [part + its_shift for part, its_shift in zip(dequantize(*coded, bits), shifts, strict=True)]


def _grouped(x: torch.Tensor, ranges: torch.Tensor) -> torch.Tensor:
    """(..., width) as (..., groups, group)."""
    return x.unflatten(-1, (ranges.shape[-1] // 2, -1))


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
    x_hat = _decoded(packed, ranges, shift, bits)
    scaled_by = zip(x_hat, *(cut(_grouped(p.float(), ranges), bits) for p in (weight, bias)), strict=True)
    return torch.cat([(part * w + b).to(dtype) for part, w, b in scaled_by], -1).flatten(-2)


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
    g = cut(_grouped(grad.float() * weight.float(), ranges), bits)
    along = _mean([a * b for a, b in zip(g, x_hat, strict=True)], grad.shape[-1])
    mean = _mean(g, grad.shape[-1]) if centered else 0.0
    parts = [((a - mean - b * along) * rstd.float().unsqueeze(-1)).to(dtype) for a, b in zip(g, x_hat, strict=True)]
    return torch.cat(parts, -1).flatten(-2)


def _mean(parts: Sequence[torch.Tensor], width: int) -> torch.Tensor:
    """The mean over each row, (images, rows, 1, 1), of its segments."""
    return functools.reduce(operator.add, [part.sum((-2, -1), keepdim=True) for part in parts]) / width


def plain_norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, centered: bool) -> torch.Tensor:
    """Layer norm (`centered`) or RMS norm over the last dimension, as inference has it."""
    if centered:
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)


def normalized(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, centered: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Layer norm (`centered`) or RMS norm over the last dimension by torch's own kernel; mean and 1 / sigma, float32, by image."""
    width = x.shape[-1]
    if centered:
        y, mean, rstd = torch.native_layer_norm(x, (width,), weight, bias, eps)
        return y, by_image(mean).float(), by_image(rstd).float()
    y = torch.nn.functional.rms_norm(x, (width,), weight, eps)
    rstd = by_image(x).float().square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return y, torch.zeros_like(rstd), rstd
