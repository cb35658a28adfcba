"""Codes of a few bits, packed into bytes.

A byte holds 8 / bits codes, the first in its lowest bits. Decoding looks whole bytes up in a table of 256 rows, one value for
each code in the byte, so that unpacking and decoding are one read.
"""

import torch

BITS = (1, 2, 4, 8)


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return -(-count * bits // 8)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 (or bool) codes, each below 2**bits, of any shape into a flat uint8 tensor of `packed_size` bytes."""
    per_byte = 8 // bits
    flat = codes.reshape(-1).view(torch.uint8)
    if flat.numel() % per_byte:
        flat = torch.nn.functional.pad(flat, (0, per_byte - flat.numel() % per_byte))
    columns = flat.view(-1, per_byte)
    packed = columns[:, 0].clone()
    for i in range(1, per_byte):
        packed |= columns[:, i] << (i * bits)
    return packed


def look_up(packed: torch.Tensor, values: torch.Tensor, bits: int, shape: torch.Size) -> torch.Tensor:
    """Decode: a tensor of `shape` whose elements are `values[code]`.

    Args:
        packed: what `pack` made of codes of this shape.
        values: one value for each of the 2**bits codes.
    """
    shifts = torch.arange(0, 8, bits, device=packed.device)
    codes = (torch.arange(256, device=packed.device).unsqueeze(1) >> shifts) & (2**bits - 1)  # (256, 8 / bits)
    table = values[codes]
    decoded = table.index_select(0, packed.int()).view(-1)
    return decoded[: shape.numel()].view(shape)
