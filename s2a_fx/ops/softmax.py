"""Softmax that keeps a few bits of its output: the paper's equations (7) to (9).

Two forms. `softmax` alone frees nothing where another operator keeps the same map, as the product with the values does in every
attention. `softmax_matmul` is the map, its dropout and that product as one operator, which keeps

    the map, quantized, eq. (8), `bits` an element    the values v    the dropout's mask, one bit an element
"""

import torch
import torch.nn.functional as F

from s2a_fx.ops import uniform
from s2a_fx.ops.bits import look_up, pack, packed_size
from s2a_fx.ops.dropout import kept_scale


def softmax_kernel(x: torch.Tensor, dim: int, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Softmax of `x` along `dim` with its packed codes and their range."""
    y = torch.softmax(x, dim)
    return y, *uniform.encode(y.to(torch.float32, copy=True), bits)


def softmax_matmul_kernel(
    scores: torch.Tensor, value: torch.Tensor, dropout_p: float, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`dropout(softmax(scores)) @ value` with the packed map, its range and the packed dropout mask (empty without dropout).

    Args:
        scores: (..., N, K), their last dimension normalized.
        value: (..., K, D) with the same leading dimensions.
    """
    y = torch.softmax(scores, -1)
    if dropout_p > 0:
        noise = F.dropout(torch.ones_like(y), dropout_p)  # the draw that F.dropout(y) would make
        out, kept = torch.matmul(y * noise, value), pack(noise != 0, 1)
        del noise
    else:
        out, kept = torch.matmul(y, value), y.new_empty(0, dtype=torch.uint8)
    return out, *uniform.encode(y.float(), bits), kept


softmax = torch.library.custom_op("s2a_fx::softmax", softmax_kernel, mutates_args=())
softmax_matmul = torch.library.custom_op(
    "s2a_fx::softmax_matmul", softmax_matmul_kernel, mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)


def softmax_gradient(y: torch.Tensor, grad: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """The gradient of softmax from its output, eq. (7): y (g - sum(y g))."""
    product = y * grad
    return product.addcmul_(y, product.sum(dim, keepdim=True), value=-1)


@softmax.register_fake
def _(x: torch.Tensor, dim: int, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    codes = x.new_empty(packed_size(x.numel(), bits), dtype=torch.uint8)
    return torch.empty_like(torch.softmax(x, dim)), codes, x.new_empty(2, dtype=torch.float32)


@softmax_matmul.register_fake
def _(
    scores: torch.Tensor, value: torch.Tensor, dropout_p: float, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    count = scores.numel()
    return (
        torch.matmul(torch.softmax(scores, -1), value),
        scores.new_empty(packed_size(count, bits), dtype=torch.uint8),
        scores.new_empty(2, dtype=torch.float32),
        scores.new_empty(packed_size(count, 1) if dropout_p > 0 else 0, dtype=torch.uint8),
    )


def _setup_softmax(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])
    ctx.dtype = inputs[0].dtype
    _, ctx.dim, ctx.bits = inputs


def _softmax_backward(ctx, grad, _codes, _range):  # type: ignore[no-untyped-def]
    if grad is None:
        return None, None, None
    codes, range_ = ctx.saved_tensors
    y = uniform.decode(codes, range_, ctx.bits, grad.shape)
    return softmax_gradient(y, grad.float(), ctx.dim).to(ctx.dtype), None, None


def _setup_softmax_matmul(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    scores, value, ctx.dropout_p, ctx.bits = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(value, *output[1:])
    ctx.shape, ctx.dtype = scores.shape, scores.dtype


def _softmax_matmul_backward(ctx, grad, _codes, _range, _kept):  # type: ignore[no-untyped-def]
    if grad is None:
        return None, None, None, None
    value, codes, range_, kept = ctx.saved_tensors
    y = uniform.decode(codes, range_, ctx.bits, ctx.shape)
    grad_scores, grad_value = map_gradients(y, value, grad, kept, ctx.dropout_p)
    return grad_scores.to(ctx.dtype), grad_value, None, None


def map_gradients(
    y: torch.Tensor, value: torch.Tensor, grad: torch.Tensor, kept: torch.Tensor, dropout_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `dropout(y) @ value`, y = softmax(scores), with respect to the scores (float32) and the values.

    Args:
        y: the map, (..., N, K), float32.
        kept: the packed mask of the dropout; empty without dropout.
    """
    grad_map = torch.matmul(grad, value.to(grad.dtype).transpose(-2, -1)).float()
    if dropout_p > 0:
        scales = torch.tensor([0.0, kept_scale(dropout_p)], device=y.device)
        noise = look_up(kept, scales, 1, y.shape)
        grad_map *= noise
        grad_value = torch.matmul((y * noise).to(grad.dtype).transpose(-2, -1), grad)
    else:
        grad_value = torch.matmul(y.to(grad.dtype).transpose(-2, -1), grad)
    return softmax_gradient(y, grad_map), grad_value.to(value.dtype)


softmax.register_autograd(_softmax_backward, setup_context=_setup_softmax)
softmax_matmul.register_autograd(_softmax_matmul_backward, setup_context=_setup_softmax_matmul)
