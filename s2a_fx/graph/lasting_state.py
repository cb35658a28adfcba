"""What a model keeps from one call for the next, outside of its buffers: a graph has no place for it.

A forward may note things on its modules: the size of the last map, an attention to look at. Only a model whose next call does
something else because of it is refused.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from s2a_fx.errors import TraceError
from s2a_fx.graph.fidelity import Behaviour, difference
from s2a_fx.graph.torch_internals import MODULE_TABLES

_State = dict[tuple[str, str], Any]


def refuse(model: nn.Module, run: Callable[[], Behaviour]) -> Behaviour:
    """What `run` returns, which calls `model`.

    Raises:
        TraceError: the model changes an attribute, and behaves otherwise in its next call; names the attribute.
    """
    before = _state(model)
    found = run()
    after = _state(model)
    changed = [key for key, value in after.items() if key not in before or not _is_same(value, before[key])]
    if changed and difference(found, run()) is not None:
        path, name = changed[0]
        place = f"{path or 'the model itself'} ({type(model.get_submodule(path)).__name__})"
        raise TraceError(
            f"{place}: keeps {name!r} from one call for the next, and computes something else with it; a graph has no place for "
            "it: make it a buffer, or an argument."
        )
    return found


def _state(model: nn.Module) -> _State:
    """The attributes of the modules that are not torch's own tables, what collections hold included."""
    return {
        (path, name): _shown(value)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if name not in MODULE_TABLES
    }


def _shown(value: Any) -> Any:
    """A collection as it is now; anything else is itself."""
    if isinstance(value, dict):
        return tuple(value.items())
    return tuple(value) if isinstance(value, list | set) else value


def _is_same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_is_same, a, b))
    if a is b or isinstance(a, torch.Tensor):
        return a is b
    return type(a) is type(b) and isinstance(a, int | float | complex | str | bytes) and a == b
