"""Rows of codes of 1 to 8 bits, packed into bytes.

A code is cut into planes of 4, 2 and 1 bits: 6 bits are a plane of 4 and one of 2. A plane of w bits puts 8 / w codes into a
byte, taken a segment of the row apart, not side by side: packing is then shifts of contiguous segments, which compilers vectorize.
"""

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


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 codes below 2**bits, (rows, width), into uint8 (rows, width * bits / 8)."""
    segments = _segments(bits)
    columns = codes.split(codes.shape[1] // segments, 1)
    packed = []
    for width, shift in _planes(bits):
        count = segments * width // 8
        for i in range(count):
            parts = [((columns[i + k * count] >> shift) & (2**width - 1)) << (width * k) for k in range(8 // width)]
            packed.append(_joined(parts))
    return torch.cat(packed, 1) if len(packed) > 1 else packed[0]


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes, uint8 (rows, width), that `pack` was given."""
    segments = _segments(bits)
    pieces = packed.split(packed.shape[1] * 8 // bits // segments, 1)
    columns = []
    for i in range(segments):
        parts, start = [], 0
        for width, shift in _planes(bits):
            count = segments * width // 8
            parts.append(((pieces[start + i % count] >> (width * (i // count))) & (2**width - 1)) << shift)
            start += count
        columns.append(_joined(parts))
    return torch.cat(columns, 1) if len(columns) > 1 else columns[0]


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    whole = parts[0]
    for part in parts[1:]:
        whole = whole | part
    return whole
