"""Random numbers of Python and NumPy, and seeds: a graph has no node for them, and a model that draws or seeds is refused.

`random` and `numpy.random` draw from two generators of the process. A generator of the model's own, such as
`numpy.random.default_rng()`, is not seen.
"""

import contextlib
import functools
import pickle
import random
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from s2a_fx.errors import TraceError
from s2a_fx.graph.model_code import line_of_frame, namespaces_of

T = TypeVar("T")
_RUNS = 3
"""In how many runs a generator must change while nobody calls it by a known name; another thread may be in the middle of a call."""

_SEEDS = (torch.manual_seed, torch.seed, torch.set_rng_state)


def run_refusing_draws(model: nn.Module, run: Callable[[], T]) -> T:
    """What `run` returns, which calls `model`.

    Raises:
        TraceError: the model drew with Python's or NumPy's random numbers, or set the state of torch's; names the line. The
            generators are as before.
    """
    before = _states()
    try:
        with _refuse_seeds(model) as seeded:
            result = run()
        if seeded:  # again, if the model caught it
            raise _refusal_of_seed(seeded)
        if _states() != before and (place := _place_of_draw(model, run)) is not None:
            raise TraceError(f"{place}: draws with Python's or NumPy's random; draw with torch.rand(()).")
    except TraceError:
        _restore(before)
        raise
    return result


def _states() -> tuple[Any, bytes]:
    return random.getstate(), pickle.dumps(np.random.get_state(legacy=False))


def _restore(states: tuple[Any, bytes]) -> None:
    if _states() != states:
        random.setstate(states[0])
        np.random.set_state(pickle.loads(states[1]))


def _refusal_of_seed(places: Sequence[str]) -> TraceError:
    return TraceError(f"{places[0]}: sets the state of torch's generator; draw with a torch.Generator of the model's own.")


@contextlib.contextmanager
def _refuse_seeds(model: nn.Module) -> Iterator[list[str]]:
    """Raise where this thread sets the state of torch's generator, by a name of torch's or of the model's files."""
    thread = threading.get_ident()
    places: list[str] = []

    def refusing(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == thread:
                places.append(line_of_frame(sys._getframe(1), "contextlib") or "the model itself")
                raise _refusal_of_seed(places)
            return function(*args, **kwargs)

        return call

    with _replaced((vars(torch), vars(torch.random), *namespaces_of(model)), lambda value: value in _SEEDS, refusing):
        yield places


@contextlib.contextmanager
def _replaced(
    namespaces: Collection[dict[str, Any]], wanted: Callable[[Any], bool], made: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Replace the functions that are `wanted` wherever they are named."""
    with contextlib.ExitStack() as restored:
        for namespace in namespaces:
            for name, value in list(namespace.items()):
                if callable(value) and not isinstance(value, type) and wanted(value):
                    restored.callback(namespace.__setitem__, name, value)
                    namespace[name] = made(value)
        yield


def _place_of_draw(model: nn.Module, run: Callable[[], Any]) -> str | None:
    """The line that draws first; None if `run` draws nothing, and another thread did."""
    for _ in range(_RUNS):
        before = _states()
        with _watch(model) as draws:
            run()
        if draws.own:
            return draws.own[0]
        if draws.others or _states() == before:
            return None
    return _line_of_change(run)


def _line_of_change(run: Callable[[], Any]) -> str | None:
    """The line that draws by a name that nobody knows; None where only Python's generator changes, and this thread calls it not.

    The profiler sees calls of Python's generator, but not of NumPy's, whose position tells.
    """
    found: list[str] = []
    python, profiler, position = _generators()[0], sys.getprofile(), _position()

    def look(frame: FrameType, event: str, argument: Any) -> None:
        calls = event == "c_call" and getattr(argument, "__self__", None) is python
        if not found and (calls or _position() != position):
            found.append(_line_of(frame))

    sys.setprofile(look)
    try:
        run()
    finally:
        sys.setprofile(profiler)
    return found[0] if found else None


def _position() -> Any:
    """Where NumPy's generator stands among the numbers that it has made."""
    state: Any = np.random.get_state(legacy=False)
    return state["state"].get("pos", state["state"].get("state"))


def _generators() -> tuple[Any, Any]:
    """Python's generator and NumPy's, of which the functions of `random` and `numpy.random` are methods."""
    return random.random.__self__, np.random.rand.__self__  # type: ignore[attr-defined]


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
    draws, generators = _Draws(), _generators()

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            draws.note(sys._getframe(1))
            return function(*args, **kwargs)

        return call

    def is_drawing(value: Any) -> bool:
        return any(getattr(value, "__self__", None) is generator for generator in generators)

    with _replaced((vars(random), vars(np.random), *namespaces_of(model)), is_drawing, noted):
        yield draws
