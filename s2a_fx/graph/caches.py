"""What models keep for the whole process: results of functions under `functools.cache` and `functools.lru_cache`."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import _lru_cache_wrapper, partial
from types import CellType, FunctionType
from typing import Any

from torch import nn

from s2a_fx.graph.model_code import classes_of, namespaces_of

_LOCK = threading.RLock()

_Place = tuple[Callable[[Any], None], Any]
"""How to write to a place, and the cached function that stands there."""


@contextlib.contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """Call what stands behind the caches in the files of the model's classes: a cache would hand fake tensors to everybody.

    Other threads call the same functions meanwhile, which return what they would return, a little later.
    """
    with _LOCK, contextlib.ExitStack() as restored:
        for put, cached in list(_places(model)):
            restored.callback(put, cached)
            put(cached.__wrapped__)
        yield


def _places(model: nn.Module) -> Iterator[_Place]:
    """Where cached functions stand: as names of files and classes, and inside of functions that are decorated otherwise."""
    for namespace in namespaces_of(model):
        for name, value in list(namespace.items()):
            yield from _within(value, partial(namespace.__setitem__, name))
    for base in classes_of(model):
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
