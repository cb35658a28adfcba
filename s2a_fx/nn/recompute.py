"""What modules that recompute in their backward share: the state of the forward, entered again, and layers without a forward."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import timm.layers
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

State = Sequence[torch.Tensor]


def autocast_state(device: str) -> tuple[bool, torch.dtype]:
    """Whether autocast is on for a device type, and its dtype."""
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def entered(state: tuple[bool, torch.dtype], device: str) -> AbstractContextManager[Any]:
    """The context that `autocast_state` was taken in."""
    return torch.autocast(device, enabled=state[0], dtype=state[1])


def random_state(device: torch.device) -> State:
    """The states of the generators that code on `device` draws from."""
    states = [torch.get_rng_state()]
    return states if device.type != "cuda" else [*states, torch.cuda.get_rng_state(device)]


def state_before(x: torch.Tensor) -> State:
    """The generators' states before a forward on `x`; none for fake tensors, which draw nothing."""
    return [] if isinstance(x, FakeTensor) else random_state(x.device)


def unless_unchanged(states: State, device: torch.device) -> State | None:
    """The states, if anything was drawn since they were taken."""
    present = random_state(device) if states else []
    return None if all(torch.equal(a, b) for a, b in zip(states, present, strict=True)) else states


class Replay(AbstractContextManager[None]):
    """Draw again what was drawn after `states` were taken, and leave the generators as they were; None: nothing was drawn."""

    def __init__(self, states: State | None, device: torch.device) -> None:
        self.states, self.device = states, device

    def __enter__(self) -> None:
        if self.states is not None:
            self.present = random_state(self.device)
            _set_random_state(self.states, self.device)

    def __exit__(self, *error: Any) -> None:
        if self.states is not None:
            _set_random_state(self.present, self.device)


def _set_random_state(states: State, device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


_most_parts: int | None = None


@contextmanager
def at_most_parts(count: int) -> Iterator[None]:
    """Inside this context only so many parts of fake tensors run: simulations ask what is allocated, and not for values."""
    global _most_parts
    before, _most_parts = _most_parts, count
    try:
        yield
    finally:
        _most_parts = before


def parts(x: torch.Tensor, images: int) -> list[tuple[int, torch.Tensor]]:
    """The tensor, at most `images` of its first dimension at a time, each part with where it starts; 0: all at once."""
    if not images or images >= x.shape[0]:
        return [(0, x)]
    size = -(-x.shape[0] // -(-x.shape[0] // images))  # parts alike: a small last one would run at a worse rate
    starts = list(range(0, x.shape[0], size))[: _most_parts if isinstance(x, FakeTensor) else None]
    return [(start, x[start : start + size]) for start in starts]


def refuse_second_derivative() -> None:
    """Raise in a backward that is itself to be differentiated: what it reads are codes."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "compressed layers have no second derivative, and create_graph=True asks for one; take a recipe without compression."
        )


def detached(value: Any) -> Any:
    """A tensor as a leaf of its own, its need of a gradient kept; anything else as it is."""
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value


def has_hooks(module: nn.Module) -> bool:
    """Whether anything is to happen when the module runs, forward or backward."""
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def can_be_ghost(module: nn.Module | None) -> bool:
    """Whether a module is a plain linear layer or convolution, without hooks: what `Ghost` knows the backward of."""
    if module is None or has_hooks(module) or hasattr(module, "parametrizations"):
        return False
    if type(module) in (nn.Linear, timm.layers.Linear):
        return True
    plain = type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return plain and module.padding_mode == "zeros" and not isinstance(module.padding, str)


class Ghost(nn.Module):
    """A linear layer or convolution whose output's values nobody reads: its forward computes none, its backward is the layer's."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # not registered: it keeps its one name in the state dict

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer: Any = self.__dict__["layer"]
        if isinstance(layer, nn.Linear):
            return _GhostLinear.apply(x, layer.weight, layer.bias)  # type: ignore[no-any-return]
        options = (layer.stride, layer.padding, layer.dilation, layer.groups)
        return _GhostConvolution.apply(x, layer.weight, layer.bias, *options)  # type: ignore[no-any-return]


class _GhostLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        ctx.dtype = x.dtype
        return x.new_empty(1).expand(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_weight = None if x is None else (rows.mT @ x.flatten(0, -2).to(grad.dtype)).to(weight.dtype)
        grad_bias = rows.sum(0).to(weight.dtype) if ctx.needs_input_grad[2] else None
        grad_x = (grad @ weight.to(grad.dtype)).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, grad_weight, grad_bias


class _GhostConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *options: Any) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options = options
        ctx.bias_sizes = None if bias is None else [weight.shape[0]]
        sizes = [
            (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for size, stride, pad, dilation, kernel in zip(x.shape[2:], *options[:3], weight.shape[2:], strict=True)
        ]
        return x.new_empty(1).expand(x.shape[0], weight.shape[0], *sizes)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.options
        gradients = torch.ops.aten.convolution_backward(
            grad, x.to(grad.dtype), weight.to(grad.dtype), ctx.bias_sizes, stride, padding, dilation, False,
            [0] * len(stride), groups, list(ctx.needs_input_grad[:3]),
        )  # fmt: skip
        kinds = (x.dtype, weight.dtype, weight.dtype)
        return *(None if g is None else g.to(kind) for g, kind in zip(gradients, kinds, strict=True)), None, None, None, None
