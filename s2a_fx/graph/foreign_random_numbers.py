"""Random numbers of Python and NumPy: a graph has no node for them, and a model that draws them is refused."""

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import numpy as np

from s2a_fx.errors import TraceError

T = TypeVar("T")


def refuse(run: Callable[[], T]) -> T:
    """What `run` returns, the random states as before.

    Raises:
        TraceError: it drew with Python's or NumPy's random numbers; names the line.
    """
    with _states_kept():
        before = _states()
        result = run()
        drew = _states() != before
    if not drew:
        return result
    raise TraceError(f"{_place_of_draw(run)}: draws with Python's or NumPy's random; draw with torch.rand(()).")


@contextmanager
def _states_kept() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _states() -> tuple[Any, ...]:
    numpy: Any = np.random.get_state()
    name, keys, *rest = numpy
    return random.getstate(), name, keys.tobytes(), *rest


def _place_of_draw(run: Callable[[], Any]) -> str:
    """The line that draws first."""
    found: list[str] = []

    def look(frame: FrameType, event: str, argument: Any) -> None:
        if not found and _states() != before:
            caller: FrameType | None = frame
            while caller is not None and caller.f_globals.get("__name__", "").partition(".")[0] in ("random", "numpy", "torch"):
                caller = caller.f_back
            found.append(f"line {caller.f_lineno} of {caller.f_code.co_filename}" if caller is not None else "the model itself")

    with _states_kept():
        before, profiler = _states(), sys.getprofile()
        sys.setprofile(look)
        try:
            run()
        finally:
            sys.setprofile(profiler)
    return found[0] if found else "the model itself"
