"""Random numbers of Python and NumPy, and seeds: a graph has no node for them, and a model that draws or seeds is refused.

`random` and `numpy.random` draw from two generators of the process. A generator of the model's own, such as
`numpy.random.default_rng()`, is not seen.
"""

import contextlib
import functools
import itertools
import random
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from s2a_fx.errors import TraceError
from s2a_fx.graph.model_code import line_of_frame, namespaces_of

T = TypeVar("T")


def refuse(model: nn.Module, run: Callable[[], T]) -> T:
    """What `run` returns, which calls `model`.

    Raises:
        TraceError: the model drew with Python's or NumPy's random numbers, or set the state of torch's; names the line. The
            generators are as before.
    """
    before = _states()
    try:
        with _refuse_seeds():
            result = run()
        if _states() != before and (place := _place_of_draw(model, run)) is not None:
            raise TraceError(f"{place}: draws with Python's or NumPy's random; draw with torch.rand(()).")
    except BaseException:
        _restore(before)
        raise
    return result


def _place_of_draw(model: nn.Module, run: Callable[[], Any]) -> str | None:
    """The line that draws first; None if `run` draws nothing, and another thread did."""
    before = _states()
    with _watch(model) as draws:
        run()
    if draws.own:
        return draws.own[0]
    return None if draws.others or _states() == before else _line_of_change(run)


@contextlib.contextmanager
def _refuse_seeds() -> Iterator[None]:
    """Raise where this thread sets the state of torch's generators."""
    thread = threading.get_ident()

    def refusing(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == thread:
                place = line_of_frame(sys._getframe(1), "contextlib") or "the model itself"
                raise TraceError(f"{place}: sets the state of torch's generator; draw with a torch.Generator of the model's own.")
            return function(*args, **kwargs)

        return call

    with contextlib.ExitStack() as restored:
        for module, name in itertools.product((torch, torch.random), ("manual_seed", "seed", "set_rng_state")):
            function = getattr(module, name)
            restored.callback(setattr, module, name, function)
            setattr(module, name, refusing(function))
        yield


def _states() -> tuple[Any, ...]:
    numpy: Any = np.random.get_state()
    name, keys, *rest = numpy
    return random.getstate(), name, keys.tobytes(), *rest


def _restore(states: tuple[Any, ...]) -> None:
    python, name, keys, *rest = states
    random.setstate(python)
    np.random.set_state((name, np.frombuffer(keys, dtype=np.uint32), *rest))


def _line_of_change(run: Callable[[], Any]) -> str:
    """The line at which the generators first change, where they are called by a name that nobody knows."""
    found: list[str] = []
    before, profiler = _states(), sys.getprofile()

    def look(frame: FrameType, event: str, argument: Any) -> None:
        if not found and _states() != before:
            found.append(_line_of(frame))

    sys.setprofile(look)
    try:
        run()
    finally:
        sys.setprofile(profiler)
    return found[0] if found else "the model itself"


def _line_of(frame: FrameType) -> str:
    return line_of_frame(frame, "random", "numpy") or "the model itself"


@dataclass
class _Draws:
    """The lines of this thread that drew, in order, and whether other threads did."""

    own: list[str] = field(default_factory=list)
    others: bool = False
    thread: int = field(default_factory=threading.get_ident)

    def note(self, frame: FrameType) -> None:
        if threading.get_ident() != self.thread:
            self.others = True
        else:
            self.own.append(_line_of(frame))


@contextlib.contextmanager
def _watch(model: nn.Module) -> Iterator[_Draws]:
    """Write down who calls a method of the two generators by its name in `random`, `numpy.random`, or a file of the model."""
    draws = _Draws()
    generators = [random.random.__self__, np.random.rand.__self__]  # type: ignore[attr-defined]

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            draws.note(sys._getframe(1))
            return function(*args, **kwargs)

        return call

    with contextlib.ExitStack() as restored:
        for namespace in (vars(random), vars(np.random), *namespaces_of(model)):
            for name, value in list(namespace.items()):
                if any(getattr(value, "__self__", None) is generator for generator in generators):
                    restored.callback(namespace.__setitem__, name, value)
                    namespace[name] = noted(value)
        yield draws
