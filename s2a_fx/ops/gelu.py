"""GELU that keeps a few bits of its input: the paper's equations (10) to (12).

    forward    y = gelu(x), the model's own form, unchanged to the last bit
    keeps      x clipped to [-2, 2] and quantized over its own range, eq. (8): `bits` an element, and two floats
    backward   dy/dx = sigmoid(1.702 x) + 0.22 sin(1.5 x), eq. (12), at the dequantized x

SiLU, y = x sigmoid(x), is the paper's form of GELU, eq. (10), with x stretched by 1.702: the same code serves it at x / 1.702.
"""

import torch
import torch.nn.functional as F

from s2a_fx.ops import uniform
from s2a_fx.ops.bits import look_up, packed_size

CLIP = 2.0
STRETCH = 1.702


def gelu_kernel(x: torch.Tensor, approximate: str, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """GELU of `x` with the packed codes of `x` and their range."""
    codes = uniform.encode(x.float().clamp(-CLIP, CLIP), bits)  # before y: the clipped copy and y never live together
    return F.gelu(x, approximate=approximate), *codes


def silu_kernel(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """SiLU of `x` with the packed codes of `x / 1.702` and their range."""
    codes = uniform.encode(x.float().div(STRETCH).clamp_(-CLIP, CLIP), bits)
    return F.silu(x), *codes


gelu = torch.library.custom_op("s2a_fx::gelu", gelu_kernel, mutates_args=())
silu = torch.library.custom_op("s2a_fx::silu", silu_kernel, mutates_args=())


def derivative(x: torch.Tensor) -> torch.Tensor:
    """The paper's derivative of GELU, eq. (12)."""
    return torch.sigmoid(STRETCH * x) + 0.22 * torch.sin(1.5 * x)


def _fake(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.empty_like(x),
        x.new_empty(packed_size(x.numel(), bits), dtype=torch.uint8),
        x.new_empty(2, dtype=torch.float32),
    )


@gelu.register_fake
def _(x: torch.Tensor, approximate: str, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _fake(x, bits)


@silu.register_fake
def _(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _fake(x, bits)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, codes, range_ = output
    ctx.mark_non_differentiable(codes, range_)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(codes, range_)
    ctx.bits = inputs[-1]
    ctx.arity = len(inputs)


def _backward(ctx, grad, _codes, _range):  # type: ignore[no-untyped-def]
    if grad is None:
        return (None,) * ctx.arity
    codes, range_ = ctx.saved_tensors
    slopes = derivative(uniform.levels(range_, ctx.bits))  # 2**bits values are enough: x takes no others
    slope = look_up(codes, slopes, ctx.bits, grad.shape)
    return slope.mul_(grad).to(grad.dtype), *(None,) * (ctx.arity - 1)


gelu.register_autograd(_backward, setup_context=_setup_context)
silu.register_autograd(_backward, setup_context=_setup_context)
