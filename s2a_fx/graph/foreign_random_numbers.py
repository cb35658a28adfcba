"""Random numbers of Python and NumPy: a graph has no node for them, and a model that draws them is refused.

`random` and `numpy.random` draw from two generators of the process. A generator of the model's own, such as
`numpy.random.default_rng()`, is not seen.
"""

import contextlib
import functools
import random
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, TypeVar

import numpy as np
from torch import nn

from s2a_fx.errors import TraceError
from s2a_fx.graph.model_code import line_of_frame, namespaces_of

T = TypeVar("T")


def refuse(model: nn.Module, run: Callable[[], T]) -> T:
    """What `run` returns, which calls `model`.

    Raises:
        TraceError: the model drew with Python's or NumPy's random numbers; names the line. The generators are as before.
    """
    before = _states()
    try:
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
