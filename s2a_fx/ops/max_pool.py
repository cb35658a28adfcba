"""Max pooling that keeps where in its window each maximum stood, in ceil(log2(kh * kw)) bits; exact.

torch keeps the input and an int64 index for each output. An index is where the window starts and a place in it; a window of 3 by 3
has nine places: 4 bits. The forward is torch's own kernel, and so is the backward, on indices made anew: ties fall as in torch.
"""

import torch

from s2a_fx.codecs.packing import pack, packed_width, unpack
from s2a_fx.fusion import fused
from s2a_fx.ops import flat

LARGEST = 256
"""Places in a window that a code can tell apart."""


def bits_of(kernel: list[int]) -> int:
    """Bits that tell the places in a window apart."""
    return max(1, (kernel[0] * kernel[1] - 1).bit_length())


@fused
def places_in_window(
    indices: torch.Tensor, top: torch.Tensor, left: torch.Tensor, width: int, dilation: list[int], columns: int
) -> torch.Tensor:
    """The place in its window, row by row of `columns`, of each index into a plane of `width`; top, left: the windows' corners."""
    row, column = indices // width - top, indices % width - left
    return (row // dilation[0] * columns + column // dilation[1]).to(torch.uint8)


@fused
def indices_in_plane(
    places: torch.Tensor, top: torch.Tensor, left: torch.Tensor, width: int, dilation: list[int], columns: int
) -> torch.Tensor:
    """What `places_in_window` was given."""
    places = places.long()
    return (places // columns * dilation[0] + top) * width + places % columns * dilation[1] + left


@fused
def pack_places(places: torch.Tensor, bits: int) -> torch.Tensor:
    """`pack` of (rows, width)."""
    return pack(places, bits)


@fused
def unpack_places(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """`unpack`, joined."""
    return torch.cat([codes.to(torch.uint8) for codes in unpack(packed, bits)], 1)


def max_pool_kernel(
    x: torch.Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil_mode: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The maxima (N, C, H', W') of windows of `x` (N, C, H, W), and the packed places where they stood."""
    y, indices = torch.ops.aten.max_pool2d_with_indices(x, kernel, stride, padding, dilation, ceil_mode)
    channels_last = flat.is_channels_last(y)
    places = places_in_window(
        _by_window(indices, channels_last), *_corners(indices, stride, padding, channels_last), x.shape[3], dilation, kernel[1]
    )
    return y, pack_places(flat.rows(places), bits_of(kernel))


def _by_window(t: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """(N, C, H', W') as (planes, windows, channels side by side), in the order in which it lies in memory."""
    batch, channels, height, width = t.shape
    if channels_last:
        return t.permute(0, 2, 3, 1).reshape(batch, height * width, channels)
    return t.reshape(batch * channels, height * width, 1)


def _corners(y: torch.Tensor, stride: list[int], padding: list[int], channels_last: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of the first place of each window, (1, windows, 1)."""
    height, width = y.shape[2:]
    top = torch.arange(height, device=y.device) * stride[0] - padding[0]
    left = torch.arange(width, device=y.device) * stride[1] - padding[1]
    return top.repeat_interleave(width).view(1, -1, 1), left.repeat(height).view(1, -1, 1)


max_pool = torch.library.custom_op("s2a_fx::max_pool", max_pool_kernel, mutates_args=())


@max_pool.register_fake
def _(
    x: torch.Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil_mode: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    y = torch.ops.aten.max_pool2d_with_indices(x, kernel, stride, padding, dilation, ceil_mode)[0]
    count, width = flat.row_count(y.numel())
    return y, x.new_empty(count, packed_width(width, bits_of(kernel)), dtype=torch.uint8)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, *ctx.options = inputs
    y, codes = output
    ctx.mark_non_differentiable(codes)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(codes)
    ctx.shape, ctx.channels_last = x.shape, flat.is_channels_last(y)
    ctx.source_last = flat.is_channels_last(x)


def _backward(ctx, grad, _codes):  # type: ignore[no-untyped-def]
    if grad is None:
        return (None,) * 6
    kernel, stride, padding, dilation, _ = ctx.options
    grad = grad.contiguous(memory_format=torch.channels_last if ctx.channels_last else torch.contiguous_format)
    places = unpack_places(ctx.saved_tensors[0], bits_of(kernel)).reshape(-1)[: grad.numel()]
    by_window = places.view(_by_window(grad, ctx.channels_last).shape)
    corners = _corners(grad, stride, padding, ctx.channels_last)
    indices = indices_in_plane(by_window, *corners, ctx.shape[3], dilation, kernel[1])
    indices = flat.restore(indices, grad.shape, ctx.channels_last)
    if ctx.source_last:  # of the input the kernel reads the shape and the memory order
        like = grad.new_empty(ctx.shape).contiguous(memory_format=torch.channels_last)
    else:
        like = grad.new_empty(1).expand(ctx.shape)
    grad_x = torch.ops.aten.max_pool2d_with_indices_backward(grad, like, *ctx.options, indices)
    return grad_x, None, None, None, None, None


max_pool.register_autograd(_backward, setup_context=_setup_context)
