"""Uniform quantization with one range for the whole tensor: the paper's equations (8) and (9)."""

import torch

from s2a_fx.ops.bits import look_up, pack


def encode(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize `x`, eq. (8): q = round((x - min) / s), s = (max - min) / (2**bits - 1).

    Args:
        x: float32, of any shape, overwritten.

    Returns:
        The packed codes (flat, uint8) and the range (min, s) as two float32 numbers.
    """
    if x.numel() == 0:
        return x.new_empty(0, dtype=torch.uint8), x.new_tensor([0.0, 1.0])
    low, high = x.aminmax()
    step = ((high - low) / (2**bits - 1)).clamp_min(torch.finfo(x.dtype).tiny)  # a constant tensor has no range to divide
    codes = x.sub_(low).div_(step).round_().to(torch.uint8)
    return pack(codes, bits), torch.stack((low, step))


def levels(range_: torch.Tensor, bits: int) -> torch.Tensor:
    """What each code stands for, eq. (9): q * s + min; float32 of shape (2**bits,)."""
    low, step = range_.unbind()
    return torch.arange(2**bits, device=range_.device, dtype=range_.dtype) * step + low


def decode(packed: torch.Tensor, range_: torch.Tensor, bits: int, shape: torch.Size) -> torch.Tensor:
    """The tensor that `encode` was given, to within half a step."""
    return look_up(packed, levels(range_, bits), bits, shape)
