"""What a model keeps from one call for the next, outside of its buffers: a graph has no place for it.

A forward may note things on its modules, such as an attention to look at, and fill caches of what it would compute again. Only a
model whose next call does something else is refused.
"""

import collections
import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from s2a_fx.errors import TraceError
from s2a_fx.graph.fidelity import AtenCall, Behaviour, difference
from s2a_fx.graph.model_code import first_line
from s2a_fx.graph.torch_internals import MODULE_TABLES

_State = dict[tuple[str, str], Any]
_OPAQUE = (nn.Module, torch.Tensor, FunctionType, ModuleType, type)


def run_refusing_lasting_state(model: nn.Module, run: Callable[[], Behaviour]) -> Behaviour:
    """What `run` returns, which calls `model`.

    Raises:
        TraceError: the model changes an attribute, and behaves otherwise in its next call; names the attribute.
    """
    before = _state(model)
    found = run()
    after = _state(model)
    if not (changed := _changes(before, after)):
        return found
    path, name = changed[0]
    place = f"{path or 'the model itself'} ({type(model.get_submodule(path)).__name__})"
    try:
        again = run()
    except Exception as error:  # a forward is anybody's code
        raise TraceError(f"{place}: changes {name!r}, and its next call fails: {first_line(error)}.") from error
    if difference(found, again) is None or (_only_leaves_out(found, again) and not _changes(after, _state(model))):
        return found
    raise TraceError(
        f"{place}: keeps {name!r} from one call for the next, and computes something else with it; a graph has no place for it: "
        "make it a buffer, or an argument."
    )


@contextlib.contextmanager
def state_restored(model: nn.Module) -> Iterator[None]:
    """Undo what a run inside changes of the attributes of modules, and of collections among these."""
    before = [(module, {**vars(module)}) for module in model.modules()]
    contents = [(value, copy.copy(value)) for _, own in before for name, value in own.items() if _is_collection(name, value)]
    try:
        yield
    finally:
        for module, own in before:
            for name, value in list(vars(module).items()):
                if name not in own:
                    del vars(module)[name]
                elif value is not own[name]:
                    vars(module)[name] = own[name]
        for collection, content in contents:
            collection.clear()
            (collection.extend if isinstance(collection, list) else collection.update)(content)


def _is_collection(name: str, value: Any) -> bool:
    return type(value) in (dict, list, set) and name not in MODULE_TABLES


def _only_leaves_out(first: Behaviour, second: Behaviour) -> bool:
    """Whether the second call reads from a cache what the first one computed."""
    return _is_subsequence([call for _, call in second.live_calls()], [call for _, call in first.live_calls()])


def _is_subsequence(part: Sequence[AtenCall], whole: Sequence[AtenCall]) -> bool:
    remaining = iter(whole)
    return all(call in remaining for call in part)


def _state(model: nn.Module) -> _State:
    """The attributes of the modules that are not torch's own tables, and what they hold."""
    seen: set[int] = set()
    return {
        (path, name): _shown(value, seen)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if name not in MODULE_TABLES
    }


def _shown(value: Any, seen: set[int]) -> Any:
    """A collection or object as it is now, at its first occurrence; anything else is itself."""
    if isinstance(value, _OPAQUE) or id(value) in seen:
        return value
    if isinstance(value, dict):
        inside: Any = [item for pair in value.items() for item in pair]
    elif isinstance(value, list | tuple | set | collections.deque):
        inside = value
    elif hasattr(value, "__dict__"):
        inside = vars(value).values()
    else:
        return value
    seen.add(id(value))
    return tuple(_shown(item, seen) for item in inside)


def _changes(before: _State, after: _State) -> list[tuple[str, str]]:
    return [key for key, value in after.items() if key not in before or not _is_same(value, before[key])]


def _is_same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_is_same, a, b))
    if a is b or isinstance(a, torch.Tensor):
        return a is b
    return type(a) is type(b) and isinstance(a, int | float | complex | str | bytes) and a == b
