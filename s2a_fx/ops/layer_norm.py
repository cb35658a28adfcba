"""Layer norm and RMS norm that keep x_hat = (x - mean) / sigma in a few bits, and 1 / sigma, a number a row.

The forward is the norm's own kernel, unchanged to the last bit. The backward is in `normalize.py`.
"""

import torch

from s2a_fx.codecs.packing import packed_width
from s2a_fx.ops.normalize import by_image, channel_shift, normalize_backward, normalize_decode, normalize_encode, normalized


def layer_norm_kernel(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, centered: bool, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The norm of `x` over its last dimension, with codes, ranges and 1 / sigma, a row for each row of `x`, and the shift."""
    y, mean, rstd = normalized(x, weight, bias, eps, centered)
    rows = by_image(x)
    shift = channel_shift(rows, mean, rstd)
    return y, *normalize_encode(rows, mean, rstd, shift, bits, x.shape[-1]), rstd.bfloat16(), shift


layer_norm = torch.library.custom_op("s2a_fx::layer_norm", layer_norm_kernel, mutates_args=())


@layer_norm.register_fake
def _(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, centered: bool, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    y, mean, rstd = normalized(x, weight, bias, eps, centered)
    places = rstd.shape[:2]
    codes = x.new_empty(*places, packed_width(x.shape[-1], bits), dtype=torch.uint8)
    ranges = x.new_empty(*places, 2, dtype=torch.bfloat16)
    return y, codes, ranges, rstd.bfloat16(), channel_shift(by_image(x), mean, rstd)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, bias, _, ctx.centered, ctx.bits = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], weight)
    ctx.shape, ctx.dtype = x.shape, x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad, _codes, _ranges, _rstd, _shift):  # type: ignore[no-untyped-def]
    if grad is None:
        return (None,) * 6
    codes, ranges, rstd, shift, weight = ctx.saved_tensors
    width = ctx.shape[-1]
    grad = by_image(grad)
    scale = torch.ones(1, width, device=grad.device) if weight is None else weight.view(1, width)
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = normalize_backward(grad, codes, ranges, shift, rstd, scale, ctx.bits, ctx.centered, ctx.dtype).view(ctx.shape)
    if ctx.needs_input_grad[1]:
        one, zero = torch.ones_like(scale), torch.zeros_like(scale)
        grad_weight = (
            (grad * normalize_decode(codes, ranges, shift, one, zero, ctx.bits, torch.float32)).sum((0, 1)).to(weight.dtype)
        )
    if ctx.needs_input_grad[2]:
        grad_bias = grad.sum((0, 1)).to(ctx.bias_dtype)
    return grad_x, grad_weight, grad_bias, None, None, None


layer_norm.register_autograd(_backward, setup_context=_setup_context)
