"""What models keep for the whole process: results of functions under `functools.cache` and `functools.lru_cache`."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import _lru_cache_wrapper, partial
from types import CellType, FunctionType
from typing import Any

from torch import nn

_LOCK = threading.RLock()

_Place = tuple[Callable[[Any], None], Any]
"""How to write to a place, and the cached function that stands there."""


@contextlib.contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """Call what stands behind the caches in the files of the model's classes: a cache would hand fake tensors to everybody.

    Other threads call the same functions meanwhile, which return what they would return, a little later.
    """
    with _LOCK:
        places = list(_places(model))
        for put, cached in places:
            put(cached.__wrapped__)
        try:
            yield
        finally:
            for put, cached in places:
                put(cached)


def _places(model: nn.Module) -> Iterator[_Place]:
    """Where cached functions stand: as names of files and classes, and inside of functions that are decorated otherwise."""
    classes = dict.fromkeys(base for kind in dict.fromkeys(map(type, model.modules())) for base in kind.__mro__)
    own = [base for base in classes if base.__module__.partition(".")[0] not in ("builtins", "torch")]
    namespaces = {id(f.__globals__): f.__globals__ for base in own if isinstance(f := vars(base).get("forward"), FunctionType)}
    for namespace in namespaces.values():
        for name, value in list(namespace.items()):
            yield from _within(value, partial(namespace.__setitem__, name))
    for base in own:
        for name, value in list(vars(base).items()):
            yield from _within(value, partial(setattr, base, name))


def _within(value: Any, put: Callable[[Any], None]) -> Iterator[_Place]:
    if isinstance(value, _lru_cache_wrapper):
        yield put, value
    elif isinstance(value, FunctionType):
        for cell in value.__closure__ or ():
            if isinstance(found := _content(cell), _lru_cache_wrapper):
                yield partial(setattr, cell, "cell_contents"), found


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None
