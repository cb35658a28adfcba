"""Uniform quantization with one range a row: code = round((x - low) / step), low and step in bfloat16.

A range of its own for each row (token, pixel, head) keeps the gradient where one range for the whole tensor loses it: layer norm's
input at 4 bits has cosine .999 a row and .974 a tensor.
"""

from dataclasses import dataclass

import torch

from s2a_fx.codecs.packing import pack, packed_width, unpack
from s2a_fx.errors import InputError
from s2a_fx.fusion import fused

Coded = tuple[torch.Tensor, torch.Tensor]


def as_bfloat16(x: torch.Tensor) -> torch.Tensor:
    """float32 `x`, finite, rounded to what bfloat16 holds; by integers, because compilers may leave out a cast there and back."""
    return ((x.view(torch.int32) + 0x8000) & -0x10000).view(torch.float32)


def quantize(x: torch.Tensor, bits: int, noise: torch.Tensor | None = None) -> Coded:
    """Codes packed, uint8 (..., width * bits / 8), and ranges (low, step), bfloat16 (..., 2), of float32 `x` (..., width).

    With `noise` between 0 and 1, codes are rounded up or down by it: even noise makes them right on average.
    """
    low = x.amin(-1, keepdim=True)
    low = as_bfloat16(low - low.abs() * 2**-8)  # down: bfloat16 rounds by less than this
    span = (x.amax(-1, keepdim=True) - low) * ((1 + 2**-7) / (2**bits - 1))  # up, likewise
    step = as_bfloat16(span.clamp_min(1e-30))
    steps = (x - low) / step
    codes = (steps.round() if noise is None else (steps + noise).floor()).clamp(0, 2**bits - 1)
    return pack(codes, bits), torch.cat((low, step), -1).bfloat16()


def dequantize(packed: torch.Tensor, ranges: torch.Tensor, bits: int) -> list[torch.Tensor]:
    """What `quantize` was given, to within half a step, float32, segment by segment (see `unpack`)."""
    low, step = ranges.float().split(1, -1)
    return [codes * step + low for codes in unpack(packed, bits)]


@fused
def encode_rows(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize` of any floating (rows, width)."""
    return quantize(x.float(), bits)


@fused
def encode_rows_at_random(
    x: torch.Tensor, of_row: torch.Tensor, of_column: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize`, the noise made of numbers between 0 and 1 for each row, (rows, 1), and each column, (1, width)."""
    return quantize(x.float(), bits, (of_row + of_column).frac())


@fused
def decode_rows(packed: torch.Tensor, ranges: torch.Tensor, bits: int) -> torch.Tensor:
    """`dequantize`, joined: (rows, width)."""
    return torch.cat(dequantize(packed, ranges, bits), 1)


@dataclass(frozen=True)
class Rows:
    """Uniform codes of `bits` (1 to 8) an element, a range for each row.

    `stochastic`: round up or down at random, right on average: the expectation of what is decoded is what was coded. It draws from
    torch's generator, as dropout does: `torch.manual_seed` makes it the same again.
    """

    bits: int
    stochastic: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or isinstance(self.bits, bool) or not 1 <= self.bits <= 8:
            raise InputError(f"bits must be an integer from 1 to 8, got {self.bits!r}.")

    def nbytes(self, rows: int, width: int) -> int:
        """Bytes kept for (rows, width), ranges included."""
        return rows * (packed_width(width, self.bits) + 4)

    def encode(self, x: torch.Tensor) -> Coded:
        """Codes and ranges of `x` (rows, width), any floating dtype; the width a multiple of 8."""
        if not self.stochastic:
            return encode_rows(x, self.bits)  # type: ignore[no-any-return]
        noise = (torch.rand(x.shape[0], 1, device=x.device), torch.rand(1, x.shape[1], device=x.device))
        return encode_rows_at_random(x, *noise, self.bits)  # type: ignore[no-any-return]

    def decode(self, coded: Coded) -> torch.Tensor:
        """float32 (rows, width), each element within half a step of what was coded."""
        return decode_rows(*coded, self.bits)  # type: ignore[no-any-return]
