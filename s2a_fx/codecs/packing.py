"""Rows of codes of 1 to 8 bits, packed into bytes.

A code is cut into planes of 4, 2 and 1 bits: 6 bits are a plane of 4 and one of 2. A plane of w bits puts 8 / w codes into a
byte, taken a segment of the row apart, not side by side: packing is then arithmetic on contiguous segments, which compilers
vectorize. It is done in float32, exact on bytes: CPUs have no vector shifts of bytes.
"""

import functools
import operator

import torch

MULTIPLE = 8
"""A row is as wide as a multiple of this."""


def packed_width(width: int, bits: int) -> int:
    """Bytes that a row of `width` codes takes."""
    return width * bits // 8


def _planes(bits: int) -> list[tuple[int, int]]:
    """The (width, shift) of each plane of a code."""
    planes, shift = [], 0
    for width in (8, 4, 2, 1):
        if bits & width:
            planes.append((width, shift))
            shift += width
    return planes


def _segments(bits: int) -> int:
    """Into how many segments a row is cut: what the narrowest plane puts into a byte."""
    return 8 // (bits & -bits)


def cut(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, ...]:
    """The segments of a row of `x` (..., width), as codes of so many bits are packed."""
    return x.split(x.shape[-1] // _segments(bits), -1)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes, whole numbers below 2**bits of any dtype, (..., width), into uint8 (..., width * bits / 8)."""
    columns = cut(codes.float(), bits)
    packed = []
    for width, shift in _planes(bits):
        count = len(columns) * width // 8
        for i in range(count):
            parts = [_bits(columns[i + k * count], shift, width, bits) * 2.0 ** (width * k) for k in range(8 // width)]
            packed.append(functools.reduce(operator.add, parts).to(torch.uint8))
    return torch.cat(packed, -1) if len(packed) > 1 else packed[0]


def unpack(packed: torch.Tensor, bits: int) -> list[torch.Tensor]:
    """The codes that `pack` was given, as float32, segment by segment.

    What is computed from them is joined last: a compiler fuses all that happens to a segment, but makes a buffer of what is joined.
    """
    segments = _segments(bits)
    pieces = packed.float().split(packed.shape[-1] * 8 // bits // segments, -1)
    columns = []
    for i in range(segments):
        parts, start = [], 0
        for width, shift in _planes(bits):
            count = segments * width // 8
            parts.append(_bits(pieces[start + i % count], width * (i // count), width, 8) * 2.0**shift)
            start += count
        columns.append(functools.reduce(operator.add, parts))
    return columns


def _bits(numbers: torch.Tensor, shift: int, width: int, of: int) -> torch.Tensor:
    """The bits from `shift` to `shift + width` of whole numbers of `of` bits."""
    high = (numbers * 2.0**-shift).floor() if shift else numbers
    if shift + width == of:
        return high
    return high - (numbers * 2.0 ** -(shift + width)).floor() * 2.0**width
