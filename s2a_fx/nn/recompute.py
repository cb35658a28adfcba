"""What modules that compute a part of the model again in their backward share."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import fx, nn

from s2a_fx.graph import torch_internals
from s2a_fx.graph.regions import Region, modules_within
from s2a_fx.graph.torch_internals import FakeTensor
from s2a_fx.nn.random_numbers import may_draw

PART_BYTES = 24 * 10**6
"""What the wide tensors of a part may take: smaller parts cost time, larger ones stand in the peak."""


class Recomputed(Region):
    """Base of the modules that stand for a part of the model and run it again in the backward.

    Args:
        body: the part, from all arguments to its output.
        backward_body: the same, its last layer a `Ghost` where its values are not needed.

    """

    backward_body: fx.GraphModule

    def __init__(self, body: fx.GraphModule, backward_body: fx.GraphModule) -> None:
        super().__init__(body=body, backward_body=backward_body)
        self.draws = any(may_draw(body, node) for node in body.graph.nodes)

    def run_at_once(self) -> None:
        """From here on run all images together: for bodies into which their number is built."""
        raise NotImplementedError

    def of_body(self, *arguments: Any) -> tuple[Any, ...]:
        """What the body is called with: `body(*of_body(*arguments))` is this module without its backward."""
        return arguments


def needs_grad(*values: Any) -> bool:
    """Whether a gradient is asked for of any of the values that is a tensor."""
    return torch.is_grad_enabled() and any(isinstance(v, torch.Tensor) and v.requires_grad for v in values)


class ReplayState:
    """What a region's forward ran with, to run it again: tensors, modes, autocast, and the random numbers that it drew.

    Made before the forward; call `end_forward` after it. Fake tensors draw nothing.

    Args:
        region: the region's forward.
        values: its operands, a tensor among them.
    """

    def __init__(self, region: nn.Module, *values: Any) -> None:
        x = next(v for v in values if isinstance(v, torch.Tensor))
        self.device = x.device
        self._module_state = ModuleState(region)
        self._autocast = torch.is_autocast_enabled(x.device.type), torch.get_autocast_dtype(x.device.type)
        self._random = None if isinstance(x, FakeTensor) else _random_states(x.device)

    def end_forward(self) -> None:
        """Note what the forward wrote to; forget the generators' states if it drew nothing."""
        self._module_state.end_forward()
        if self._random is not None and all(map(torch.equal, self._random, _random_states(self.device))):
            self._random = None

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Inside, tensors and modes are those of the forward, and what was drawn is drawn again; all is afterwards as before."""
        with self._module_state.restore():
            if self._random is None:
                yield
                return
            present = _random_states(self.device)
            _set_random_states(self._random, self.device)
            try:
                yield
            finally:
                _set_random_states(present, self.device)

    def autocast(self) -> AbstractContextManager[Any]:
        """Autocast as it was."""
        enabled, dtype = self._autocast
        return torch.autocast(self.device.type, enabled=enabled, dtype=dtype)


class ModuleState:
    """The parameters, buffers and modes of a region's modules when its forward ran. Made before the forward."""

    def __init__(self, region: nn.Module) -> None:
        modules = list(modules_within(region))
        self._modes = [(module, module.training) for module in modules]
        self._weights = [slot for module in modules for slot in torch_internals.parameter_slots(module)]
        self._trained = [slot.tensor.requires_grad for slot in self._weights]
        self._read: list[torch_internals.Slot] = []
        self._written: list[torch_internals.Slot] = []  # by running norms, whose kernels leave the version as it is
        for module in modules:
            counts = isinstance(module, torch_internals.RunningNorm) and module.training
            (self._written if counts else self._read).extend(torch_internals.buffer_slots(module))
        self._versions = _versions(self._weights), _versions(self._read)

    def end_forward(self) -> None:
        """Note which buffers the forward wrote to."""
        kept = [now == version for now, version in zip(_versions(self._read), self._versions[1], strict=True)]
        self._written += [slot for slot, same in zip(self._read, kept, strict=True) if not same]
        self._read = [slot for slot, same in zip(self._read, kept, strict=True) if same]
        self._versions = self._versions[0], _versions(self._read)

    @contextmanager
    def restore(self) -> Iterator[None]:
        """Inside, the modules have the tensors and modes of the forward, and write to copies of the buffers that it wrote to.

        Raises:
            RuntimeError: what the forward read was written to in place since, as torch raises it for a saved tensor.
        """
        self._check_versions()
        modes = [(module, module.training) for module, mode in self._modes if module.training != mode]
        slots = [*self._weights, *self._read]
        others = [(slot, slot.tensor) for slot in slots if slot.present() is not slot.tensor]
        others += [(slot, slot.tensor.clone()) for slot in self._written]
        present = [(slot, slot.present()) for slot, _ in others]
        needs = zip(self._weights, self._trained, strict=True)
        turned = [slot.tensor for slot, needed in needs if slot.tensor.is_leaf and slot.tensor.requires_grad != needed]
        for module, mode in modes:
            module.training = not mode
        for slot, tensor in others:
            slot.put(tensor)
        for tensor in turned:
            tensor.requires_grad_(not tensor.requires_grad)
        try:
            yield
        finally:
            for tensor in turned:
                tensor.requires_grad_(not tensor.requires_grad)
            for slot, tensor in present:
                slot.put(tensor)
            for module, mode in modes:
                module.training = mode

    def _check_versions(self) -> None:
        for kind, slots, versions in zip(("parameter", "buffer"), (self._weights, self._read), self._versions, strict=True):
            for slot, version in zip(slots, versions, strict=True):
                now = torch_internals.version_of(slot.tensor)
                if now != version:
                    raise RuntimeError(
                        "one of the variables needed for gradient computation has been modified by an inplace operation: "
                        f"{kind} {slot.name} of shape {tuple(slot.tensor.shape)} is at version {now}; expected version {version}."
                    )


def _versions(slots: Sequence[torch_internals.Slot]) -> list[int]:
    return [torch_internals.version_of(slot.tensor) for slot in slots]


def _random_states(device: torch.device) -> list[torch.Tensor]:
    """The states of the generators that code on `device` draws from."""
    states = [torch.get_rng_state()]
    return states if device.type != "cuda" else [*states, torch.cuda.get_rng_state(device)]


def _set_random_states(states: list[torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


_most_parts: int | None = None


@contextmanager
def at_most_parts(count: int) -> Iterator[None]:
    """Inside this context only so many parts of fake tensors run: simulations ask what is allocated, and not for values."""
    global _most_parts
    before, _most_parts = _most_parts, count
    try:
        yield
    finally:
        _most_parts = before


def parts(x: torch.Tensor, images: int, together: int = 1) -> list[tuple[int, torch.Tensor]]:
    """The tensor, at most `images` of its first dimension at a time, each part with where it starts; 0: all at once.

    Parts are made of whole groups of `together` neighbours: of one at least, even if that is more than `images`.
    """
    if not images or images >= x.shape[0]:
        return [(0, x)]
    groups = -(-x.shape[0] // together)
    size = together * -(-groups // -(-groups // max(1, images // together)))  # parts alike: a small last one has a worse rate
    starts = list(range(0, x.shape[0], size))[: _most_parts if isinstance(x, FakeTensor) else None]
    return [(start, x[start : start + size]) for start in starts]


def of_each_part(nbytes: int) -> int:
    """How many go together, each of which needs so many bytes: at least one, as many as `PART_BYTES` hold."""
    return max(1, PART_BYTES // max(nbytes, 1))


def refuse_second_derivative() -> None:
    """Raise in a backward that is itself to be differentiated: what it reads are codes."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "compressed layers have no second derivative, and create_graph=True asks for one; take a recipe without compression."
        )


_TENSOR = object()
"""Stands for a tensor among constants."""


def without_tensors(values: Sequence[Any]) -> list[Any]:
    """What `with_tensors` needs beside the tensors, which autograd keeps, to make the values again; None may be one of them."""
    return [_TENSOR if isinstance(value, torch.Tensor) else value for value in values]


def with_tensors(constants: Sequence[Any], tensors: Iterator[torch.Tensor]) -> list[Any]:
    """The values that `without_tensors` was called with."""
    return [next(tensors) if constant is _TENSOR else constant for constant in constants]


def as_leaf(value: Any, needs_grad: bool) -> Any:
    """A tensor as a leaf of its own; anything else as it is."""
    return value.detach().requires_grad_(needs_grad) if isinstance(value, torch.Tensor) else value
