"""Every name of torch that torch does not promise to keep, in one place.

Each has what it is used for. All were tried on torch 2.11 and 2.14.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn

# Capture: what the model does around its calls.

CHECKPOINT_CODE: CodeType = inspect.unwrap(
    getattr(torch.utils.checkpoint, "_checkpoint_impl", torch.utils.checkpoint.checkpoint)
).__code__
"""The code that runs a checkpointed function: a capture looks for it on the stack."""

_CHECKPOINT_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(inspect.unwrap(torch.utils.checkpoint.checkpoint)).parameters.items()
    if parameter.default is not parameter.empty
}


def checkpoint_options(frame_locals: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The keyword arguments of a call of `checkpoint` from the variables of its frame: those that are not the defaults."""
    values = {**frame_locals, "preserve_rng_state": frame_locals["preserve"]}
    options = {name: values[name] for name in _CHECKPOINT_DEFAULTS if name in values and name != "function"}
    changed = {name: value for name, value in options.items() if value is not _CHECKPOINT_DEFAULTS[name]}
    return tuple({**changed, "use_reentrant": bool(options["use_reentrant"])}.items())


def autocast_options(context: torch.autocast) -> tuple[tuple[str, Any], ...]:
    """The arguments of `torch.autocast` that make another context like this one."""
    return (
        ("device_type", context.device),
        ("dtype", context.fast_dtype),
        ("enabled", context._enabled),
        ("cache_enabled", context._cache_enabled),
    )


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Leave every autocast that the caller is in, on the CPU and on CUDA."""
    devices = ("cpu", "cuda")
    before = [torch.is_autocast_enabled(device) for device in devices]
    for device in devices:
        torch.set_autocast_enabled(device, False)
    try:
        yield
    finally:
        for device, enabled in zip(devices, before, strict=True):
            torch.set_autocast_enabled(device, enabled)


# Modules: their hooks.


def forward_pre_hooks(module: nn.Module) -> list[tuple[Callable[..., Any], bool]]:
    """The forward pre-hooks of a module, each with whether it takes keyword arguments."""
    return [(hook, ident in module._forward_pre_hooks_with_kwargs) for ident, hook in module._forward_pre_hooks.items()]


def forward_hooks(module: nn.Module) -> list[tuple[Callable[..., Any], bool]]:
    """The forward hooks of a module, each with whether it takes keyword arguments."""
    return [(hook, ident in module._forward_hooks_with_kwargs) for ident, hook in module._forward_hooks.items()]


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether a module has backward hooks or backward pre-hooks."""
    return bool(module._backward_hooks or module._backward_pre_hooks)
