"""What modules that recompute do while torch.compile traces them: the same, in operations that a compiler can follow.

    eager       an autograd function runs the part, keeps codes, and runs the part again in its backward
    compiled    y = part(x), without gradients;  y_hat = checkpoint(part(decode(codes)));  y, its gradient that of y_hat

Nobody reads the values of y_hat: the compiler leaves its forward out and, as told by the checkpoint, recomputes in the backward
what its gradient needs, from the codes. It does so up to the last layer whose values are read, as a `Ghost` does in eager mode.
A part that draws random numbers would draw others for y_hat: it is compiled as it is, and keeps what autograd keeps.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from s2a_fx.codecs.rows import Rows
from s2a_fx.ops import flat
from s2a_fx.ops.normalize import normalize_backward, normalize_decode


def recomputed(value: Callable[[], torch.Tensor], part: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
    """What `value` returns, with the gradient of `part(*arguments)`, computed in the backward.

    The part comes first: of equal operators, here those on weights alone, a compiler keeps the first, and that one is recomputed.
    """
    stand_in = checkpoint(part, *arguments, use_reentrant=False)
    with torch.no_grad():
        seen = value()
    return _Instead.apply(seen, stand_in)  # type: ignore[no-any-return]


class _Instead(torch.autograd.Function):
    """The first argument, its gradient that of the second."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, stand_in: torch.Tensor) -> torch.Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return None, grad


class DecodedRows(torch.autograd.Function):
    """(x, codes, ranges, codec, channels_last) -> x as it was coded; its gradient is that of x."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, codes: torch.Tensor, ranges: torch.Tensor, bits: int, channels_last: bool
    ) -> torch.Tensor:
        decoded = flat.restore_groups(Rows(bits).decode((codes, ranges)), x.shape, channels_last)
        return decoded.to(x.dtype).view_as(x)  # reads x: Dynamo of torch 2.11 gives what is not read a gradient of zero

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad, None, None, None, None


class DecodedNorm(torch.autograd.Function):
    """(x, weight, bias, codes, ranges, rstd, shift, bits, centered, dtype) -> the normalized x as it was coded, by image."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        codes: torch.Tensor,
        ranges: torch.Tensor,
        rstd: torch.Tensor,
        shift: torch.Tensor,
        bits: int,
        centered: bool,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        ctx.save_for_backward(weight, bias, codes, ranges, rstd, shift)
        ctx.bits, ctx.centered, ctx.dtype = bits, centered, x.dtype
        return normalize_decode(codes, ranges, shift, weight, bias, bits, dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        weight, bias, codes, ranges, rstd, shift = ctx.saved_tensors
        grad_x = normalize_backward(grad, codes, ranges, shift, rstd, weight, ctx.bits, ctx.centered, ctx.dtype)
        one, zero = torch.ones_like(weight, dtype=torch.float32), torch.zeros_like(weight, dtype=torch.float32)
        unit = normalize_decode(codes, ranges, shift, one, zero, ctx.bits, torch.float32)
        grad_weight = (grad.float() * unit).sum((0, 1)).to(weight.dtype).view_as(weight)
        grad_bias = grad.sum((0, 1)).to(bias.dtype).view_as(bias)
        return grad_x, grad_weight, grad_bias, *(None,) * 7
