"""Dropout that keeps its mask in one bit an element. Draws the numbers that `F.dropout` draws; the gradient is exact."""

import torch
import torch.nn.functional as F

from s2a_fx.codecs.packing import packed_width
from s2a_fx.ops import flat
from s2a_fx.ops.activation import encode_mask, scale_by_mask


def dropout_kernel(x: torch.Tensor, p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Dropout of `x` with its packed mask."""
    noise = F.dropout(torch.ones_like(x), p)
    in_order = noise if flat.is_channels_last(x) else noise.contiguous()
    return x * noise, encode_mask(flat.rows(in_order), 0.0, float("inf"), False, False)


def kept_scale(p: float) -> float:
    """What dropout multiplies the elements by that it keeps; where it keeps none, 0."""
    return 1 / (1 - p) if p < 1 else 0.0


dropout = torch.library.custom_op("s2a_fx::dropout", dropout_kernel, mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))


@dropout.register_fake
def _(x: torch.Tensor, p: float) -> tuple[torch.Tensor, torch.Tensor]:
    count, width = flat.row_count(x.numel())
    return torch.empty_like(x), x.new_empty(count, packed_width(width, 1), dtype=torch.uint8)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])
    ctx.scale = kept_scale(inputs[1])
    ctx.channels_last, ctx.shape = flat.is_channels_last(inputs[0]), inputs[0].shape


def _backward(ctx, grad, _mask):  # type: ignore[no-untyped-def]
    if grad is None:
        return None, None
    grad = grad.contiguous(memory_format=torch.channels_last if ctx.channels_last else torch.contiguous_format)
    (mask,) = ctx.saved_tensors
    return flat.restore(scale_by_mask(flat.rows(grad), mask, ctx.scale, 0.0), ctx.shape, ctx.channels_last), None


dropout.register_autograd(_backward, setup_context=_setup_context)
