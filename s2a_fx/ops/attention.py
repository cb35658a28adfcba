"""Scaled dot-product attention that keeps q, k, v and a few bits of its map.

    forward    the output of `F.scaled_dot_product_attention`, unchanged to the last bit; with dropout, of its unfused form
    keeps      q, k, v as they are; the map softmax(q k^T scale + mask), quantized, eq. (8); the dropout's mask, one bit an element
    backward   eq. (7) at the dequantized map

The paper codes softmax's map. A fused kernel keeps none, but its output and the logsumexp: for the usual head sizes more bytes than
the coded map takes.
"""

import torch
import torch.nn.functional as F

from s2a_fx.graph import torch_internals
from s2a_fx.ops import uniform
from s2a_fx.ops.bits import pack, packed_size
from s2a_fx.ops.softmax import map_gradients


def attention_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    bits: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention with the packed map, its range and the packed dropout mask (empty without dropout).

    Args:
        query: (B, heads, N, D); key and value: (B, heads, K, D).
        mask: additive, or boolean with True for what may be attended to; broadcasts to (B, heads, N, K).
        scale: of the product q k^T.
    """
    math = torch_internals.ATTENTION_MATH
    if dropout_p > 0:
        out, dropped = math(query, key, value, mask, dropout_p, is_causal, scale=scale)
        kept = pack(dropped != 0, 1)  # where the map itself is 0, nothing flows either way
        del dropped
    else:
        out = F.scaled_dot_product_attention(query, key, value, mask, 0.0, is_causal, scale=scale)
        kept = query.new_empty(0, dtype=torch.uint8)
    y = math(query, key, value, mask, 0.0, is_causal, scale=scale)[1]
    return out, *uniform.encode(y.float(), bits), kept


attention = torch.library.custom_op(
    "s2a_fx::attention", attention_kernel, mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)


@attention.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    bits: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    count = query.shape[:-1].numel() * key.shape[-2]
    return (
        F.scaled_dot_product_attention(query, key, value, mask, dropout_p, is_causal, scale=scale),
        query.new_empty(packed_size(count, bits), dtype=torch.uint8),
        query.new_empty(2, dtype=torch.float32),
        query.new_empty(packed_size(count, 1) if dropout_p > 0 else 0, dtype=torch.uint8),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, key, value, mask, ctx.dropout_p, _, ctx.scale, ctx.bits = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, *output[1:])
    ctx.mask_shape = None if mask is None else mask.shape


def _backward(ctx, grad, _codes, _range, _kept):  # type: ignore[no-untyped-def]
    if grad is None:
        return (None,) * 8
    query, key, value, codes, range_, kept = ctx.saved_tensors
    shape = query.shape[:-1] + key.shape[-2:-1]
    y = uniform.decode(codes, range_, ctx.bits, shape)
    grad_scores, grad_value = map_gradients(y, value, grad, kept, ctx.dropout_p)
    del y
    grad_mask = grad_scores.sum_to_size(ctx.mask_shape) if ctx.needs_input_grad[3] else None
    # Out of place with a mask: its gradient may be this very tensor.
    scaled = grad_scores.mul_(ctx.scale) if grad_mask is None else grad_scores * ctx.scale
    grad_scores = scaled.to(query.dtype)
    grad_query = torch.matmul(grad_scores, key)
    grad_key = torch.matmul(grad_scores.transpose(-2, -1), query)
    return grad_query, grad_key, grad_value, grad_mask, None, None, None, None


attention.register_autograd(_backward, setup_context=_setup_context)
