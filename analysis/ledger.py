"""What happens in a simulated step, written down: every storage, when it comes, when it goes, who keeps it.

The `Ledger` sees every allocation through a dispatch mode and every release through weak references; it knows no operator.
"""

import functools
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from s2a_fx.analysis.device import DeviceModel
from s2a_fx.graph import torch_internals
from s2a_fx.graph.torch_internals import TorchDispatchMode, tree_leaves
from s2a_fx.ops import lines_of

NODE = "s2a_fx.node"
"""Key in an autograd node's metadata: the graph node whose gradient it computes."""


class Place(NamedTuple):
    """Where in the step something happens: `phase` is forward, loss, backward or optimizer; `node` a graph node or empty."""

    phase: str
    node: str
    op: str


class Event(NamedTuple):
    """The allocator holds `bytes` more (or, negative, fewer) for `storage` from here on."""

    storage: int
    bytes: int
    place: Place


@dataclass
class StorageRecord:
    """A block of memory. `kind`: parameter, buffer, input, gradient, optimizer, saved or temporary."""

    bytes: int
    kind: str
    made: Place
    last_read: str = ""  # the last node of the forward that takes it as an operand


@dataclass(frozen=True)
class SaveRecord:
    """Autograd keeps a view of `storage` for the backward of `node`."""

    storage: int
    node: str
    operand: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    order: int


@dataclass(frozen=True)
class StepRecord:
    """A simulated step: `saves` are those alive when the forward ends."""

    storages: tuple[StorageRecord, ...]
    saves: tuple[SaveRecord, ...]
    events: tuple[Event, ...]
    assumptions: tuple[str, ...]


@functools.cache
def _short_name(operator: Any) -> str:
    return torch_internals.full_name(operator).rpartition("::")[2]


def tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


class Ledger(TorchDispatchMode):
    """Writes down every storage that comes and goes."""

    def __init__(self, device: DeviceModel) -> None:
        super().__init__()
        self.device = device
        self.storages: list[StorageRecord] = []
        self.events: list[Event] = []
        self.live: dict[int, int] = {}  # storage pointer -> index
        self.place = Place("forward", "", "")
        self.closed = False

    def enter(self, phase: str, node: str) -> None:
        self.place = Place(phase, node, "")

    def own(self, tensors: Iterable[torch.Tensor], kind: str) -> None:
        for tensor in tensors:
            self.index_of(tensor, kind)

    def own_all(self, model: torch.nn.Module, inputs: Iterable[torch.Tensor]) -> None:
        """What stands before the step begins."""
        self.own(model.parameters(), "parameter")
        self.own(model.buffers(), "buffer")
        self.own(inputs, "input")

    def claim(self, tensors: Iterable[torch.Tensor], kind: str) -> None:
        """Say what storages, first seen as temporaries, turned out to be."""
        for tensor in tensors:
            record = self.storages[self.index_of(tensor)]
            if record.kind in ("temporary", "saved"):
                record.kind = kind

    def claim_state(self, values: Iterable[Any], count: int) -> None:
        """An optimizer's state for one parameter, which stands for `count` parameters like it."""
        tensors = [t for t in values if isinstance(t, torch.Tensor)]
        self.claim(tensors, "optimizer")
        for tensor in tensors * (count - 1):
            self._open(self.storages[self.index_of(tensor)].bytes, "optimizer")

    def index_of(self, tensor: torch.Tensor, kind: str = "temporary") -> int:
        storage = tensor.untyped_storage()
        pointer = torch_internals.key_of_storage(storage)
        if pointer not in self.live:
            index = self._open(storage.nbytes(), kind)
            self.live[pointer] = index
            weakref.finalize(storage, self._release, pointer)
        return self.live[pointer]

    def _open(self, nbytes: int, kind: str) -> int:
        self.storages.append(StorageRecord(nbytes, kind, self.place))
        self.events.append(Event(len(self.storages) - 1, self.device.allocated(nbytes), self.place))
        return len(self.storages) - 1

    def _release(self, pointer: int) -> None:
        index = self.live.pop(pointer)
        if not self.closed:
            self.events.append(Event(index, -self.device.allocated(self.storages[index].bytes), self.place))

    def close(self) -> None:
        """What is released from here on belongs to the simulation's own end."""
        self.closed = True

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch_internals.ASKS_DEVICE:
            return args[0].device
        self.place = Place(self.place.phase, self._node(), _short_name(func))
        lines = lines_of(func)
        if lines is not None:  # run the op's own lines, so that their temporaries are seen
            with self:
                return lines(*args, **(kwargs or {}))
        result = self.device.results(func, torch_internals.run_on_fake(func, args, kwargs or {}))
        for tensor in tensors_in(result):
            self.index_of(tensor)
        scratch = self.device.scratch(func, args, result)
        if scratch:
            index = self._open(scratch, "temporary")
            self.events.append(Event(index, -self.device.allocated(scratch), self.place))
        return result

    def _node(self) -> str:
        """In the backward, the graph node whose gradient is being computed."""
        if self.place.phase != "backward":
            return self.place.node
        running: Any = torch_internals.current_autograd_node()
        if running is None:
            return self.place.node
        return str(running.metadata.get(NODE, self.place.node))


def in_steady_state(ledger: Ledger) -> tuple[Event, ...]:
    """The events of a later step: the optimizer's state, made at the end of the simulated first step, is there from the start."""
    state = [e for e in ledger.events if ledger.storages[e.storage].kind == "optimizer"]
    rest = [e for e in ledger.events if ledger.storages[e.storage].kind != "optimizer"]
    return (*(e._replace(place=Place("forward", "", "")) for e in state), *rest)
