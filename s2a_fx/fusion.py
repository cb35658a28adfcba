"""Lines of plain PyTorch that run as one kernel.

    @fused
    def scale(x: torch.Tensor, factor: float) -> torch.Tensor: ...

makes the operator `s2a_fx::scale`. On CPU and CUDA its lines are compiled by Inductor (C++ or Triton) at the first call with these
options and trailing dimensions; the first dimension of every tensor, the rows, stays dynamic. Where nothing can be compiled, and
inside `eager()` or with `S2A_FX_COMPILE=0` in the environment, the same lines run as they stand and give the same bits.
"""

import functools
import os
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from s2a_fx.graph import torch_internals
from s2a_fx.graph.torch_internals import tree_map

_enabled = os.environ.get("S2A_FX_COMPILE", "1") != "0"

_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {
    # Roundings to 16 bits inside a kernel are kept: without it a kernel computes on with the unrounded value, and the bits differ.
    "emulate_precision_casts": True,
    # What is read often is computed again, not put into a buffer as large as the input: a kernel allocates its outputs alone.
    "realize_reads_threshold": 1000,
    "realize_opcount_threshold": 10000,
    "realize_acc_reads_threshold": 1000,
}

LINES: dict[Any, Callable[..., Any]] = {}
"""Fused operator -> its lines."""


def compiling() -> bool:
    """Whether the lines of fused operators are compiled."""
    return _enabled


@contextmanager
def eager() -> Iterator[None]:
    """Run the lines of fused operators uncompiled inside this context."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


def fused(lines: Callable[..., Any]) -> Callable[..., Any]:
    """Make an operator of `lines`, whose tensors share their first dimension or have one row; other arguments are options."""
    name = f"s2a_fx::{lines.__name__}"
    schema = torch.library.infer_schema(lines, mutates_args=())

    @functools.wraps(lines)
    def run(*args: Any) -> Any:
        if not _enabled:
            return lines(*args)
        kernel = _kernel(lines, tuple(_option(a) for a in args))
        tensors = [a.detach() for a in args if isinstance(a, torch.Tensor)]
        for tensor in tensors:
            if tensor.ndim and tensor.shape[0] > 1:
                torch_internals.mark_dynamic(tensor, 0)
        # one kernel for all circumstances: Dynamo would make one for each mode of autograd and of autocast
        with torch_internals.below_autograd_and_autocast():
            return kernel(*tensors)

    operator = torch.library.custom_op(name, run, mutates_args=(), schema=schema)
    operator.register_fake(_remembering_shapes(lines))
    LINES[torch_internals.overload_of(operator)] = lines
    return operator


@dataclass(frozen=True)
class _Tensor:
    """Stands for a tensor argument: what of it a kernel is made for."""

    trailing: tuple[int, ...]
    dtype: torch.dtype


def _option(argument: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        return _Tensor(tuple(argument.shape[1:]), argument.dtype)
    return tuple(argument) if isinstance(argument, list) else argument


@dataclass(frozen=True)
class _Like:
    """What a tensor looks like, without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(value: Any) -> Any:
        return _Like(value.shape, value.stride(), value.dtype, value.device) if isinstance(value, torch.Tensor) else _option(value)

    def empty(self) -> torch.Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


def _remembering_shapes(lines: Callable[..., Any]) -> Callable[..., Any]:
    """What `lines` return on fake tensors, run once for each set of arguments alike: a graph has many."""
    known: dict[Any, Any] = {}

    @functools.wraps(lines)
    def fake(*args: Any) -> Any:
        sizes = [n for a in args if isinstance(a, torch.Tensor) for n in (*a.shape, *a.stride())]
        if any(isinstance(n, torch.SymInt) for n in sizes):
            return lines(*args)
        key = tuple(map(_Like.of, args))
        if key not in known:
            known[key] = tree_map(_Like.of, lines(*args))
        return tree_map(_Like.empty, known[key])

    return fake


@functools.cache
def _kernel(lines: Callable[..., Any], options: tuple[Any, ...]) -> Callable[..., Any]:
    """The compiled form of `lines` for these options; falls back to the lines where compilation fails."""

    def call(*tensors: torch.Tensor) -> Any:
        given = iter(tensors)
        return lines(*(next(given) if isinstance(option, _Tensor) else option for option in options))

    # Dynamo caches by code object: one of its own for each set of options, or they would evict each other.
    own = types.FunctionType(call.__code__.replace(), call.__globals__, lines.__name__, None, call.__closure__)
    state: dict[str, Callable[..., Any]] = {}

    def run(*tensors: torch.Tensor) -> Any:
        try:
            if not state:
                state["run"] = torch.compile(own, fullgraph=True, dynamic=False, options=_OPTIONS)
            return state["run"](*tensors)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ImportError, OSError) as error:
            if state.get("run") is call:
                raise
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            warnings.warn(
                f"{lines.__name__}: Inductor could not compile it ({reason}); it runs uncompiled, slower but with the same result. "
                "S2A_FX_COMPILE=0 turns compilation off.",
                stacklevel=2,
            )
            state["run"] = call
            return call(*tensors)

    return run
