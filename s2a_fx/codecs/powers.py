"""Codes of probabilities: uniform in their root, so that the many small ones of an attention's map are told apart."""

from dataclasses import dataclass

import torch

from s2a_fx.codecs.packing import MULTIPLE
from s2a_fx.codecs.rows import Coded, Rows, dequantize, quantize
from s2a_fx.errors import InputError
from s2a_fx.fusion import fused


@fused
def encode_powers(x: torch.Tensor, bits: int, power: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize` of the root of (rows, width), not negative."""
    return quantize(x.float() ** (1 / power), bits)


@fused
def decode_powers(packed: torch.Tensor, ranges: torch.Tensor, bits: int, power: int) -> torch.Tensor:
    """What `encode_powers` was given, float32 (rows, width)."""
    return torch.cat([part.clamp_min(0) ** power for part in dequantize(packed, ranges, bits)], 1)


@dataclass(frozen=True)
class Powers:
    """Codes of `bits` (1 to 8) an element of rows that are nowhere negative, uniform in their `power`-th root, of any width."""

    bits: int
    power: int = 3

    def __post_init__(self) -> None:
        Rows(self.bits)
        if not isinstance(self.power, int) or isinstance(self.power, bool) or self.power < 1:
            raise InputError(f"power must be a positive integer, got {self.power!r}.")

    def nbytes(self, rows: int, width: int) -> int:
        """Bytes kept for (rows, width), ranges included."""
        return Rows(self.bits).nbytes(rows, width + -width % MULTIPLE)

    def encode(self, x: torch.Tensor) -> Coded:
        """Codes and ranges of `x` (rows, width), any floating dtype; a row is filled up with its last element."""
        missing = -x.shape[1] % MULTIPLE
        if missing:
            x = torch.cat((x, x[:, -1:].expand(-1, missing)), 1)
        return encode_powers(x, self.bits, self.power)  # type: ignore[no-any-return]

    def decode(self, coded: Coded, width: int) -> torch.Tensor:
        """float32 (rows, width)."""
        return decode_powers(*coded, self.bits, self.power)[:, :width]  # type: ignore[no-any-return]
