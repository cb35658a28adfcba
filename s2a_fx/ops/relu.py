"""ReLU that keeps one bit an element: where x > 0 (paper, section 3.2). The gradient is exact."""

import torch
import torch.nn.functional as F

from s2a_fx.ops.bits import look_up, pack, packed_size


def relu_kernel(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """ReLU of `x` with the packed mask of its positive elements."""
    return F.relu(x), pack(x > 0, 1)


relu = torch.library.custom_op("s2a_fx::relu", relu_kernel, mutates_args=())


@relu.register_fake
def _(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), x.new_empty(packed_size(x.numel(), 1), dtype=torch.uint8)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _backward(ctx, grad, _mask):  # type: ignore[no-untyped-def]
    if grad is None:
        return None
    (packed,) = ctx.saved_tensors
    zero = look_up(packed, torch.tensor([True, False], device=grad.device), 1, grad.shape)
    return grad.masked_fill(zero, 0)


relu.register_autograd(_backward, setup_context=_setup_context)
