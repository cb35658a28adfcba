"""Whether a graph does what its model does.

Both run on equal fake inputs. The graph is faithful if both

1. make the same ATen calls, on tensors of the same shapes and dtypes, under the same grad mode and autocast;
2. let autograd keep the same storages;
3. write to the same buffers;
4. return the same structure of the same tensors.

Only deterministic calls that read no input, parameter or buffer may be missing: their values are constants of the graph. An
augmented assignment may be a plain operator (see `assignments.py`).
"""

import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from s2a_fx.graph import torch_internals
from s2a_fx.graph.torch_internals import storage_key

_ASSIGNED = {f"aten::{name}_": f"aten::{name}" for name in ("add", "sub", "mul", "div")}

Shape = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True)
class AtenCall:
    """One call: the operator, what it reads and returns, and what it runs under."""

    operator: str
    reads: tuple[Shape, ...]
    returns: tuple[Shape, ...]
    grad_mode: bool
    autocast: tuple[bool, ...]

    def __str__(self) -> str:
        shapes = ", ".join("x".join(map(str, shape)) or "()" for shape, _ in self.reads)
        return f"{self.operator}({shapes})" + ("" if self.grad_mode else " without gradients")


@dataclass(frozen=True)
class Behaviour:
    """What a forward does; `kept` are the bytes of each storage that autograd keeps."""

    calls: tuple[AtenCall, ...]
    kept: tuple[int, ...]
    written: frozenset[str]
    result: tuple[Any, ...]


def behaviour_of(module: nn.Module, inputs: Sequence[torch.Tensor], run: Callable[[], tuple[Sequence[Any], Any]]) -> Behaviour:
    """What `run` does, which calls the fake `module` on the fake `inputs` and returns the leaves and structure of the result."""
    recorder = _Recorder(module, inputs)
    versions = {name: torch_internals.version_of(buffer) for name, buffer in module.named_buffers()}
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(recorder.pack, recorder.unpack), recorder:
        leaves, structure = run()
    written = frozenset(name for name, b in module.named_buffers() if torch_internals.version_of(b) != versions.get(name))
    result = tuple((*_shape(v), v.requires_grad) if isinstance(v, torch.Tensor) else v for v in leaves)
    return Behaviour(tuple(recorder.calls), recorder.kept(), written, (structure, *result))


def difference(model: Behaviour, graph: Behaviour) -> tuple[str, int | None] | None:
    """In what a graph differs from its model, and at which of the model's calls; None if it is faithful."""
    for index, call in enumerate(model.calls):
        if index >= len(graph.calls):
            return f"the graph drops {call}", index
        if call != graph.calls[index]:
            return f"the model calls {call}, the graph {graph.calls[index]}", index
    if len(graph.calls) > len(model.calls):
        return f"the graph adds {graph.calls[len(model.calls)]}", None
    if model.written != graph.written:
        missing, added = (_listed(a - b) for a, b in ((model.written, graph.written), (graph.written, model.written)))
        return f"the model writes to {missing}, the graph to {added}", None
    if model.result != graph.result:
        return "the graph returns another structure than the model", None
    if model.kept != graph.kept:
        return f"autograd keeps {sum(model.kept):,} bytes of the model, {sum(graph.kept):,} of the graph", None
    return None


def _listed(names: frozenset[str]) -> str:
    return ", ".join(sorted(names)) or "no other buffer"


def _shape(tensor: torch.Tensor) -> Shape:
    return tuple(tensor.shape), tensor.dtype


class _Token:
    """Stands for a tensor that autograd keeps; dies when autograd lets go of it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class _Recorder(TorchDispatchMode):
    """Writes down the calls that depend on an input, parameter or buffer, or draw."""

    def __init__(self, module: nn.Module, inputs: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.calls: list[AtenCall] = []
        self.own = {storage_key(t) for t in [*module.parameters(), *module.buffers()]}
        self.dependent = {*self.own, *map(storage_key, inputs)}  # storages whose values are no constants
        self.alive: list[Any] = []  # a storage that dies would give its key to another
        self.tokens: weakref.WeakSet[_Token] = weakref.WeakSet()

    def pack(self, tensor: torch.Tensor) -> _Token:
        token = _Token(tensor)
        self.tokens.add(token)
        return token

    def unpack(self, token: _Token) -> torch.Tensor:
        return token.tensor

    def kept(self) -> tuple[int, ...]:
        found = {storage_key(t.tensor): t.tensor.untyped_storage().nbytes() for t in self.tokens}
        return tuple(sorted(size for key, size in found.items() if key not in self.own))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        reads = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        returns = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if torch.Tag.nondeterministic_seeded in func.tags or any(storage_key(t) in self.dependent for t in reads):
            self.dependent.update(map(storage_key, (*returns, *(reads if func._schema.is_mutable else ()))))
            self.alive += [tensor.untyped_storage() for tensor in returns]
            autocast = tuple(map(torch.is_autocast_enabled, ("cpu", "cuda")))
            shapes = tuple(map(_shape, reads)), tuple(map(_shape, returns))
            name = _ASSIGNED.get(func._schema.name, func._schema.name)
            self.calls.append(AtenCall(name, *shapes, torch.is_grad_enabled(), autocast))
        return result


class _Reached(Exception):
    """Raised at the call whose place is looked for."""


def place_of_call(module: nn.Module, inputs: Sequence[torch.Tensor], run: Callable[[], Any], index: int) -> str | None:
    """The source line outside of torch that makes a call, by its number in the behaviour's calls."""
    recorder = _Stopping(module, inputs, index)
    try:
        with torch.enable_grad(), recorder:
            run()
    except _Reached:
        pass
    return recorder.place


class _Stopping(_Recorder):
    def __init__(self, module: nn.Module, inputs: Sequence[torch.Tensor], index: int) -> None:
        super().__init__(module, inputs)
        self.index = index
        self.place: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if len(self.calls) > self.index:
            self.place = _user_line(sys._getframe(1))
            raise _Reached
        return result


def _user_line(frame: FrameType | None) -> str | None:
    """Line and file of the innermost frame that is not torch's."""
    while frame is not None and (frame.f_code.co_filename.startswith(torch.__path__[0]) or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    return f"line {frame.f_lineno} of {frame.f_code.co_filename}" if frame is not None else None
