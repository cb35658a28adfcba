"""Batch norm that keeps its input in a few bits, or nothing where the backward does not read it.

    batch_norm           statistics of the batch     keeps codes of x, mean and 1 / sigma of each channel
    frozen_batch_norm    statistics given            keeps codes of x only if its weight is trained: y = x * scale + shift

The forward is torch's own kernel, unchanged to the last bit, and so is the backward, run on the decoded x. `bits` 0: x is not kept;
then `batch_norm` has a gradient of its bias alone, `frozen_batch_norm` one of x and bias, both exact. Shapes: x (N, C, ...),
everything else (C,). An operator with a gradient may change no argument: `batch_norm` returns the running statistics anew.
"""

import torch
import torch.nn.functional as F

from s2a_fx.codecs.packing import packed_width
from s2a_fx.codecs.rows import Rows
from s2a_fx.graph import torch_internals
from s2a_fx.ops import flat

_WIDTH = 64  # elements that share a range: neighbours in memory

Running = tuple[torch.Tensor | None, torch.Tensor | None]
Keep = tuple[torch.Tensor, torch.Tensor]
Statistics = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def batch_norm_kernel(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    momentum: float,
    eps: float,
    bits: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y; codes and ranges of x; mean and 1 / sigma; the running mean and variance after this batch, empty where there are none."""
    y, statistics = _normalized(x, weight, bias, (running_mean, running_var), momentum, eps)
    return y, *_coded(x, bits), *statistics


def frozen_batch_norm_kernel(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    eps: float,
    bits: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y; codes and ranges of x."""
    return F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps), *_coded(x, bits)


def _normalized(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, running: Running, momentum: float, eps: float
) -> tuple[torch.Tensor, Statistics]:
    """What `F.batch_norm` computes, by the kernel that it picks (cuDNN's has bits of its own), and the statistics."""
    new_mean, new_var = (None if t is None else t.clone() for t in running)
    cudnn = torch.backends.cudnn.enabled
    y, mean, invstd, *_ = torch_internals.batch_norm_with_statistics(x, weight, bias, new_mean, new_var, True, momentum, eps, cudnn)
    none = mean.new_empty(0)
    return y, (mean, invstd, none if new_mean is None else new_mean, none.clone() if new_var is None else new_var)


def _coded(x: torch.Tensor, bits: int) -> Keep:
    return Rows(bits).encode(flat.rows(x, _WIDTH)) if bits else _keep(x, 0)


def _keep(x: torch.Tensor, bits: int) -> Keep:
    """Empty tensors of the shapes that `_coded` returns."""
    count = -(-x.numel() // _WIDTH) if bits else 0
    return x.new_empty(count, packed_width(_WIDTH, bits), dtype=torch.uint8), x.new_empty(count, 2, dtype=torch.bfloat16)


batch_norm = torch.library.custom_op("s2a_fx::batch_norm", batch_norm_kernel, mutates_args=())
frozen_batch_norm = torch.library.custom_op("s2a_fx::frozen_batch_norm", frozen_batch_norm_kernel, mutates_args=())


@batch_norm.register_fake
def _(x, weight, bias, running_mean, running_var, momentum, eps, bits):  # type: ignore[no-untyped-def]
    y, statistics = _normalized(x, weight, bias, (running_mean, running_var), momentum, eps)
    return y, *_keep(x, bits), *statistics


@frozen_batch_norm.register_fake
def _(x, weight, bias, running_mean, running_var, eps, bits):  # type: ignore[no-untyped-def]
    return F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps), *_keep(x, bits)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, _, bias, *_ = inputs
    ctx.bits, ctx.eps = inputs[-1], inputs[-2]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.shape, ctx.dtype, ctx.channels_last = x.shape, x.dtype, flat.is_channels_last(x)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _setup_batch_norm(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _setup(ctx, inputs, output)
    _, codes, ranges, mean, invstd, *_ = output
    if ctx.bits:
        ctx.save_for_backward(codes, ranges, mean, invstd, inputs[1])


def _setup_frozen_batch_norm(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _setup(ctx, inputs, output)
    _, weight, _, running_mean, running_var, *_ = inputs
    ctx.save_for_backward(running_mean, running_var, weight, *(output[1:] if ctx.bits else ()))


def _in_order(ctx, grad):  # type: ignore[no-untyped-def]
    """The gradient in the memory order of x."""
    return grad.contiguous(memory_format=torch.channels_last if ctx.channels_last else torch.contiguous_format)


def _decoded(ctx, codes, ranges):  # type: ignore[no-untyped-def]
    return flat.restore(Rows(ctx.bits).decode((codes, ranges)), ctx.shape, ctx.channels_last).to(ctx.dtype)


def _gradients(ctx, grad, x, weight, given, saved, train):  # type: ignore[no-untyped-def]
    """grad_x, grad_weight, grad_bias where they are asked for; `given` and `saved`: mean and variance, mean and 1 / sigma."""
    wanted = list(ctx.needs_input_grad[:3])
    found = torch.ops.aten.native_batch_norm_backward(grad, x, weight, *given, *saved, train, ctx.eps, wanted)
    return [g if want else None for g, want in zip(found, wanted, strict=True)]


def _backward_batch_norm(ctx, grad, *_others):  # type: ignore[no-untyped-def]
    if grad is None:
        return (None,) * 8
    if not ctx.bits:
        grad_bias = None
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, *range(2, grad.ndim)), dtype=ctx.bias_dtype)
        return (None, None, grad_bias, *(None,) * 5)
    codes, ranges, mean, invstd, weight = ctx.saved_tensors
    grad = _in_order(ctx, grad)
    x = _decoded(ctx, codes, ranges)
    return (*_gradients(ctx, grad, x, weight, (None, None), (mean, invstd), True), *(None,) * 5)


def _backward_frozen_batch_norm(ctx, grad, *_others):  # type: ignore[no-untyped-def]
    if grad is None:
        return (None,) * 7
    running_mean, running_var, weight, *coded = ctx.saved_tensors
    grad = _in_order(ctx, grad)
    x = _decoded(ctx, *coded) if coded else grad  # read for the gradient of the weight alone
    return (*_gradients(ctx, grad, x, weight, (running_mean, running_var), (None, None), False), *(None,) * 4)


batch_norm.register_autograd(_backward_batch_norm, setup_context=_setup_batch_norm)
frozen_batch_norm.register_autograd(_backward_frozen_batch_norm, setup_context=_setup_frozen_batch_norm)
