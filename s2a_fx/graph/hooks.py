"""Forward hooks of modules that are traced through, as modules that run them."""

from collections.abc import Callable
from typing import Any

from torch import nn

from s2a_fx.errors import InputError
from s2a_fx.graph import torch_internals
from s2a_fx.graph.torch_internals import tree_flatten


class _Hook(nn.Module):
    """A hook that is run where it stood.

    Args:
        hook: the function.
        module: the module that it is registered on, and is called with.
        with_kwargs: whether it takes keyword arguments, too.
    """

    hook: Callable[..., Any]
    module: nn.Module

    def __init__(self, hook: Callable[..., Any], module: nn.Module, with_kwargs: bool) -> None:
        super().__init__()
        self.__dict__.update(hook=hook, module=module)  # not registered: the module keeps its one name in the state dict
        self.with_kwargs = with_kwargs
        torch_internals.keep_call(self)  # a hook may act, and return nothing

    def extra_repr(self) -> str:
        return f"{getattr(self.hook, '__qualname__', self.hook)} on {type(self.module).__name__}"

    def _leaves(self, before: Any, after: Any) -> tuple[Any, ...]:
        leaves, spec = tree_flatten(after)
        if spec != tree_flatten(before)[1]:
            raise InputError(
                f"{self.extra_repr()}: the hook returned another structure than it was given; return as many tensors, "
                "in the same place."
            )
        return tuple(leaves)


class PreHook(_Hook):
    """A forward pre-hook: from (args, kwargs) to the leaves of those that the forward is called with."""

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        if self.with_kwargs:
            returned = self.hook(self.module, args, kwargs)
            return self._leaves((args, kwargs), (args, kwargs) if returned is None else returned)
        returned = self.hook(self.module, args)
        changed = args if returned is None else returned if isinstance(returned, tuple) else (returned,)
        return self._leaves((args, kwargs), (changed, kwargs))


class PostHook(_Hook):
    """A forward hook: from (args, kwargs, result) to the leaves of the result that the caller gets."""

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> tuple[Any, ...]:
        given = (args, kwargs, result) if self.with_kwargs else (args, result)
        returned = self.hook(self.module, *given)
        return self._leaves(result, result if returned is None else returned)


def forward_pre_hooks_of(module: nn.Module) -> list[PreHook]:
    """The module's forward pre-hooks, in the order in which they run."""
    return [PreHook(hook, module, with_kwargs) for hook, with_kwargs in torch_internals.forward_pre_hooks(module)]


def forward_hooks_of(module: nn.Module) -> list[PostHook]:
    """The module's forward hooks, in the order in which they run."""
    return [PostHook(hook, module, with_kwargs) for hook, with_kwargs in torch_internals.forward_hooks(module)]


def is_same(module: nn.Module, hook: nn.Module) -> bool:
    """Whether two modules run one hook of one module."""
    return type(module) is type(hook) and isinstance(hook, _Hook) and (module.hook, module.module) == (hook.hook, hook.module)
