"""Whether a graph does what its model does.

Both run on equal fake inputs. The graph is faithful if both

1. make the same ATen calls, on tensors of the same shapes and dtypes and on the same numbers, under the same grad mode and
   autocast; the values of constant tensors are not compared;
2. let autograd keep the same storages;
3. write to the same buffers;
4. return the same structure of the same tensors.

Only deterministic calls that read no input, parameter or buffer may be missing: their values are constants of the graph. So may
those whose results nobody reads: they are dead code. An augmented assignment may be a plain operator (see `assignments.py`).
"""

import functools
import math
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from s2a_fx.errors import TraceError
from s2a_fx.graph import torch_internals
from s2a_fx.graph.model_code import line_of_frame
from s2a_fx.graph.spellings import ASSIGNED_NAMES
from s2a_fx.graph.torch_internals import TorchDispatchMode, storage_key

_ASSIGNED = {f"aten::{name}": f"aten::{plain}" for name, plain in ASSIGNED_NAMES.items()}

Shape = tuple[tuple[int, ...], torch.dtype]


class AtenCall(NamedTuple):
    """One call: the operator, the tensors and constants that it takes, what it returns, and what it runs under."""

    operator: str
    reads: tuple[Shape, ...]
    constants: tuple[Any, ...]
    returns: tuple[Shape, ...]
    grad_mode: bool
    autocast: tuple[bool, ...]

    def __str__(self) -> str:
        shapes = ", ".join("x".join(map(str, shape)) or "()" for shape, _ in self.reads)
        constants = ", ".join(str(value) for value in self.constants if value is not None)
        return f"{self.operator}({', '.join(filter(None, (shapes, constants)))})" + ("" if self.grad_mode else " without gradients")


@dataclass(frozen=True)
class Behaviour:
    """What a forward does.

    Attributes:
        dead: numbers of the calls whose results nobody reads.
        kept: bytes of each storage that autograd keeps.
    """

    calls: tuple[AtenCall, ...]
    dead: frozenset[int]
    kept: tuple[int, ...]
    written: frozenset[str]
    result: tuple[Any, ...]

    def live_calls(self) -> list[tuple[int, AtenCall]]:
        """The calls whose results are read, or that act otherwise, each with its number."""
        return [(index, call) for index, call in enumerate(self.calls) if index not in self.dead]


def behaviour_of(module: nn.Module, inputs: Sequence[torch.Tensor], run: Callable[[], tuple[Sequence[Any], Any]]) -> Behaviour:
    """What `run` does, which calls the fake `module` on the fake `inputs` and returns the leaves and structure of the result."""
    recorder = _Recorder(module, inputs)
    before = _marks(module)
    alive = [(t, t.untyped_storage()) for t in (*module.parameters(), *module.buffers())]  # what dies gives its marks to another
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(recorder.pack, recorder.unpack), recorder:
        leaves, structure = run()
    if recorder.refusal is not None:
        raise recorder.refusal
    recorder.note_reads(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
    written = frozenset(name for name, mark in _marks(module).items() if mark != before.get(name))
    alive.clear()
    result = tuple((*_shape(v), v.requires_grad) if isinstance(v, torch.Tensor) else v for v in leaves)
    return Behaviour(tuple(recorder.calls), recorder.dead_calls(), recorder.kept(), written, (structure, *result))


def difference(model: Behaviour, graph: Behaviour) -> tuple[str, int | None] | None:
    """In what a graph differs from its model, and at which of the model's calls; None if it is faithful."""
    ours, theirs = model.live_calls(), graph.live_calls()
    for (index, call), (_, given) in zip(ours, theirs, strict=False):
        if call != given:
            return f"the model calls {call}, the graph {given}", index
    if len(ours) > len(theirs):
        index, call = ours[len(theirs)]
        return f"the graph drops {call}", index
    if len(theirs) > len(ours):
        return f"the graph adds {theirs[len(ours)][1]}", None
    if model.written != graph.written:
        missing, added = (_listed(a - b) for a, b in ((model.written, graph.written), (graph.written, model.written)))
        return f"the model writes to {missing}, the graph to {added}", None
    if model.result != graph.result:
        return "the graph returns another structure than the model", None
    if model.kept != graph.kept:
        return f"autograd keeps {sum(model.kept):,} bytes of the model, {sum(graph.kept):,} of the graph", None
    return None


def _marks(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """What changes of each buffer and parameter that is written to, is replaced by another tensor, or gets other `data`."""
    buffers = {name: (id(b), storage_key(b), torch_internals.version_of(b)) for name, b in module.named_buffers()}
    return {**buffers, **{name: (id(p), storage_key(p)) for name, p in module.named_parameters()}}  # calls that write are compared


def _listed(names: frozenset[str]) -> str:
    return ", ".join(sorted(names)) or "no other buffer"


def _shape(tensor: torch.Tensor) -> Shape:
    return tuple(tensor.shape), tensor.dtype


class _Token:
    """Stands for a tensor that autograd keeps; dies when autograd lets go of it.

    An operator's own result would hold the operator, which holds this token, and no garbage collector sees through autograd.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor if tensor.grad_fn is None else torch_internals.shadow_of(tensor)


class _Operator(NamedTuple):
    """What is known of an ATen operator: its name, whether it draws random numbers, and whether it writes to an operand."""

    name: str
    draws: bool
    writes: bool


@functools.cache
def _operator_of(func: Any) -> _Operator:
    name = torch_internals.full_name(func)
    draws = torch.Tag.nondeterministic_seeded in func.tags
    return _Operator(_ASSIGNED.get(name, name), draws, torch_internals.is_mutable(func))


class _Recorder(TorchDispatchMode):
    """Writes down the calls that depend on an input, parameter or buffer, or draw."""

    def __init__(self, module: nn.Module, inputs: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.calls: list[AtenCall] = []
        self.own = {storage_key(t) for t in [*module.parameters(), *module.buffers()]}
        self.dependent = {*self.own, *map(storage_key, inputs)}  # storages whose values are no constants
        self.alive: list[Any] = []  # a storage that dies would give its key to another
        self.readers: dict[int, set[int | None]] = {}  # number of a call -> those that read it; None for what must stay
        self.refusal: TraceError | None = None
        self.tokens: weakref.WeakSet[_Token] = weakref.WeakSet()

    def pack(self, tensor: torch.Tensor) -> _Token:
        token = _Token(tensor)
        self.tokens.add(token)
        return token

    def unpack(self, token: _Token) -> torch.Tensor:
        return token.tensor

    def note_reads(self, tensors: Iterable[torch.Tensor], reader: int | None = None) -> None:
        """Remember that tensors are read: by a call that may be dead, or by the result or a call that acts."""
        for tensor in tensors:
            recorder, maker = getattr(tensor, _MAKER, (None, None))
            if recorder is self:
                self.readers[maker].add(reader)

    def dead_calls(self) -> frozenset[int]:
        """The calls that nobody reads but others of the kind."""
        found: set[int] = set()
        for call in sorted(self.readers, reverse=True):
            if self.readers[call] <= found:
                found.add(call)
        return frozenset(found)

    def kept(self) -> tuple[int, ...]:
        """The bytes of each storage that autograd keeps, but for parameters, buffers, and constants."""
        found = {storage_key(t.tensor): t.tensor.untyped_storage().nbytes() for t in self.tokens}
        counted = self.dependent - self.own
        return tuple(sorted(size for key, size in found.items() if key in counted))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch_internals.ASKS_DEVICE:
            return args[0].device
        kwargs = kwargs or {}
        operator = _operator_of(func)
        if operator.writes and self.refusal is None and _outlives(func, args, kwargs):
            self.refusal = TraceError(
                f"{line_of_frame(sys._getframe(1))}: writes to a tensor that outlives the call and is no buffer; a graph has no "
                "place for it: register it as a buffer of the module."
            )
        if self.refusal is not None:  # again, if the model caught it
            raise self.refusal
        result = torch_internals.run_on_fake(func, args, kwargs)
        acts = operator.draws or operator.writes
        number = len(self.calls)
        reads, constants = _tensors_and_constants((*args, *kwargs.values()))
        self.note_reads(reads, None if acts else number)
        keys = [storage_key(t) for t in reads]
        if operator.draws or not self.dependent.isdisjoint(keys):
            returns = _tensors_in((result,))
            storages = [t.untyped_storage() for t in returns]
            self.alive += storages
            self.dependent.update(map(torch_internals.key_of_storage, storages))
            if operator.writes:
                self.alive += [t.untyped_storage() for t in reads]
                self.dependent.update(keys)
            autocast = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
            shapes = tuple(map(_shape, reads)), tuple(constants), tuple(map(_shape, returns))
            self.calls.append(AtenCall(operator.name, *shapes, torch.is_grad_enabled(), autocast))
            if not acts:
                self.readers[number] = set()
                for tensor in returns:
                    setattr(tensor, _MAKER, (self, number))
        return result


_MAKER = "s2a_fx_maker"
"""Attribute of a tensor: the recorder that saw the call that made it, and the call's number."""


def _tensors_and_constants(values: Iterable[Any]) -> tuple[list[torch.Tensor], list[Any]]:
    """What the arguments or results of an operator consist of, which nest in lists and tuples alone; NaN is equal to itself."""
    tensors: list[torch.Tensor] = []
    constants: list[Any] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            tensors.append(value)
        elif isinstance(value, list | tuple):
            inner_tensors, inner_constants = _tensors_and_constants(value)
            tensors += inner_tensors
            constants += inner_constants
        elif not isinstance(value, torch.Generator):
            constants.append("nan" if isinstance(value, float) and math.isnan(value) else value)
    return tensors, constants


def _tensors_in(values: Iterable[Any]) -> list[torch.Tensor]:
    """The tensors among the arguments or results of an operator."""
    return _tensors_and_constants(values)[0]


def _outlives(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operator writes to a tensor that is older than the run, and neither parameter nor buffer: those are fake."""
    parameters = torch_internals.schema_of(func).parameters
    given = {**dict(zip((p.name for p in parameters), args, strict=False)), **kwargs}
    written = _tensors_in(given.get(parameter.name) for parameter in parameters if parameter.is_written)
    return not all(isinstance(tensor, torch_internals.FakeTensor) for tensor in written)


class _Reached(BaseException):
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
        if len(self.calls) > self.index and self.place is None:
            self.place = line_of_frame(sys._getframe(1))
            raise _Reached
        return result
