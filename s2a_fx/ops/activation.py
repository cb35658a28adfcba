"""Activations that keep a few bits of each element: the bin of its derivative, or a mask where the derivative has two values.

forward    y = f(x), the activation's own kernel, unchanged to the last bit
keeps      binned: `bits` an element (see `codecs/bins.py`);  masked: one bit
backward   the slope of the element's bin; exact for masked activations
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.torch_version import TorchVersion

from s2a_fx.codecs.bins import best_bins, encode_bins, scale_by_bins
from s2a_fx.codecs.packing import cut, pack, packed_width, unpack
from s2a_fx.fusion import fused
from s2a_fx.ops import flat

BINNED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "elu": F.elu,
    "selu": F.selu,
    "softplus": F.softplus,
}
"""Activations with a smooth derivative. Name -> function."""


_CLAMP_IS_CLOSED = TorchVersion(torch.__version__) < "2.14"  # the slope of clamp at its bounds became 0 (pytorch issue 195931)


@dataclass(frozen=True)
class Masked:
    """An activation whose slope is `inside` where low < x < high (`closed`: with equality; `rounded`: bounds
    rounded to x's dtype first) and `outside` elsewhere."""

    function: Callable[..., torch.Tensor]
    low: float
    high: float
    inside: float = 1.0
    outside: float = 0.0
    closed: bool = False
    rounded: bool = False


def masked_rule(name: str, options: list[float]) -> Masked:
    """The rule of `relu`, `relu6`, `leaky_relu` (slope), `hardsigmoid`, `hardtanh` (low, high) or `clamp` (low, high)."""
    infinity = float("inf")
    if name == "relu":
        return Masked(F.relu, 0.0, infinity)
    if name == "relu6":
        return Masked(F.relu6, 0.0, 6.0)
    if name == "leaky_relu":
        return Masked(functools.partial(F.leaky_relu, negative_slope=options[0]), 0.0, infinity, 1.0, options[0])
    if name == "hardsigmoid":
        return Masked(F.hardsigmoid, -3.0, 3.0, 1 / 6)
    if name == "hardtanh":
        return Masked(functools.partial(F.hardtanh, min_val=options[0], max_val=options[1]), options[0], options[1])
    return Masked(
        functools.partial(torch.clamp, min=options[0], max=options[1]),
        options[0],
        options[1],
        closed=_CLAMP_IS_CLOSED,
        rounded=True,
    )


@fused
def encode_mask(x: torch.Tensor, low: float, high: float, closed: bool, rounded: bool) -> torch.Tensor:
    """Whether each element of (rows, width) lies between the bounds, one bit each."""
    dtype = x.dtype if rounded else torch.float32
    bounds = [torch.full((), bound, dtype=dtype, device=x.device).float() for bound in (low, high)]
    x = x.float()
    inside = (x >= bounds[0]).float() if closed else (x > bounds[0]).float()
    if high < math.inf:
        inside = inside * ((x <= bounds[1]).float() if closed else (x < bounds[1]).float())
    return pack(inside, 1)


@fused
def scale_by_mask(grad: torch.Tensor, packed: torch.Tensor, inside: float, outside: float) -> torch.Tensor:
    """`grad` times `inside` where the bit is set, times `outside` elsewhere."""
    scaled = []
    for part, codes in zip(cut(grad.float(), 1), unpack(packed, 1), strict=True):
        scaled.append(torch.where(codes > 0, part * inside, part * outside if outside else 0.0).to(grad.dtype))
    return torch.cat(scaled, 1)


def binned_kernel(x: torch.Tensor, name: str, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The activation of `x` and its packed bins."""
    return BINNED[name](x), encode_bins(flat.rows(x), list(best_bins(BINNED[name], bits).boundaries), bits)


def masked_kernel(x: torch.Tensor, name: str, options: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """The activation of `x` and its packed mask."""
    rule = masked_rule(name, options)
    return rule.function(x), encode_mask(flat.rows(x), rule.low, rule.high, rule.closed, rule.rounded)


binned = torch.library.custom_op("s2a_fx::binned", binned_kernel, mutates_args=())
masked = torch.library.custom_op("s2a_fx::masked", masked_kernel, mutates_args=())


@binned.register_fake
def _(x: torch.Tensor, name: str, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    return BINNED[name](x), _codes(x, bits)


@masked.register_fake
def _(x: torch.Tensor, name: str, options: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    return masked_rule(name, options).function(x), _codes(x, 1)


def _codes(x: torch.Tensor, bits: int) -> torch.Tensor:
    count, width = flat.row_count(x.numel())
    return x.new_empty(count, packed_width(width, bits), dtype=torch.uint8)


def _setup_binned(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, ctx.name, ctx.bits = inputs
    _setup(ctx, x, output)


def _setup_masked(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, ctx.name, ctx.options = inputs
    _setup(ctx, x, output)


def _setup(ctx, x, output) -> None:  # type: ignore[no-untyped-def]
    codes = output[1]
    ctx.mark_non_differentiable(codes)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(codes)
    ctx.channels_last = flat.is_channels_last(x)
    ctx.shape = x.shape


def _gradient(ctx, grad):  # type: ignore[no-untyped-def]
    """The gradient in the memory order of the activation."""
    return grad.contiguous(memory_format=torch.channels_last if ctx.channels_last else torch.contiguous_format)


def _restored(ctx, values):  # type: ignore[no-untyped-def]
    return flat.restore(values, ctx.shape, ctx.channels_last)


def _binned_backward(ctx, grad, _codes):  # type: ignore[no-untyped-def]
    if grad is None:
        return None, None, None
    grad = _gradient(ctx, grad)
    levels = list(best_bins(BINNED[ctx.name], ctx.bits).levels)
    return _restored(ctx, scale_by_bins(flat.rows(grad), ctx.saved_tensors[0], levels, ctx.bits)), None, None


def _masked_backward(ctx, grad, _codes):  # type: ignore[no-untyped-def]
    if grad is None:
        return None, None, None
    grad = _gradient(ctx, grad)
    rule = masked_rule(ctx.name, ctx.options)
    return _restored(ctx, scale_by_mask(flat.rows(grad), ctx.saved_tensors[0], rule.inside, rule.outside)), None, None


binned.register_autograd(_binned_backward, setup_context=_setup_binned)
masked.register_autograd(_masked_backward, setup_context=_setup_masked)
