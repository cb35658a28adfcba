"""A convolution with a frozen weight, which keeps nothing.

PyTorch's own keeps its input even where no gradient of the weight is asked for (pytorch issue 133566). The gradient of the input,
the transposed convolution of grad_y, needs the weight alone, that of the bias grad_y alone.
"""

import torch
import torch.nn.functional as F

_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def frozen_convolution_kernel(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> torch.Tensor:
    """The convolution of `x`, in its precision."""
    bias = None if bias is None else bias.to(x.dtype)
    return torch.convolution(x, weight.to(x.dtype), bias, stride, padding, dilation, False, [0] * len(stride), groups)


frozen_convolution = torch.library.custom_op("s2a_fx::frozen_convolution", frozen_convolution_kernel, mutates_args=())
frozen_convolution.register_fake(frozen_convolution_kernel)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, bias, ctx.stride, ctx.padding, ctx.dilation, ctx.groups = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(weight)
    ctx.sizes, ctx.dtype = x.shape[2:], x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    if grad is None:
        return (None,) * 7
    (weight,) = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        extra = [
            size - ((g - 1) * stride - 2 * pad + dilation * (kernel - 1) + 1)
            for size, g, stride, pad, dilation, kernel in zip(
                ctx.sizes, grad.shape[2:], ctx.stride, ctx.padding, ctx.dilation, weight.shape[2:], strict=True
            )
        ]
        transposed = _TRANSPOSED[len(extra)]
        grad_x = transposed(grad, weight.to(grad.dtype), None, ctx.stride, ctx.padding, extra, ctx.groups, ctx.dilation).to(
            ctx.dtype
        )
    if ctx.needs_input_grad[2]:
        grad_bias = grad.sum((0, *range(2, grad.ndim))).to(ctx.bias_dtype)
    return grad_x, None, grad_bias, None, None, None, None


frozen_convolution.register_autograd(_backward, setup_context=_setup_context)
