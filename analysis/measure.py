"""Measure on real tensors what the other analyses predict, by independent means: to check a report on one's own machine."""

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from s2a_fx.analysis.loss import default_loss
from s2a_fx.graph import torch_internals


class _Kept:
    """What a saved-tensor hook hands to autograd in place of the tensor; dies when autograd lets go."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def measure_saved_bytes(model: nn.Module, inputs: Sequence[torch.Tensor]) -> int:
    """Bytes that autograd keeps when the forward of `model` ends, each storage once, parameters and buffers left out."""
    kept: WeakSet[_Kept] = WeakSet()

    def pack(tensor: torch.Tensor) -> _Kept:
        token = _Kept(tensor.detach())  # a node's own output would keep its node, and the node the token: never freed
        kept.add(token)
        return token

    weights = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda token: token.tensor):
        output = model(*inputs)
    storages = {token.tensor.untyped_storage().data_ptr(): token.tensor.untyped_storage().nbytes() for token in kept}
    del output
    return sum(size for pointer, size in storages.items() if pointer not in weights)


def measure_peak_bytes(
    model: nn.Module,
    inputs: Sequence[torch.Tensor],
    optimizer: torch.optim.Optimizer | None = None,
    loss: Callable[[Any], torch.Tensor] = default_loss,
) -> int:
    """The most bytes alive at once in the second of two training steps on the CPU, counted from the allocator's own events.

    Args:
        model, inputs: real, on the CPU.
        optimizer: over the model's trainable parameters; its step is part of the step.
        loss: from the model's output to a scalar.
    """

    def step() -> None:
        value = loss(model(*inputs))
        value.backward()
        del value
        if optimizer is not None:
            optimizer.step()
        model.zero_grad()

    step()
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)] if optimizer else []
    standing = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in map(_here, [*model.parameters(), *model.buffers(), *inputs, *state])
    }
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    now = highest = sum(standing.values())
    for _, size in sorted(_allocations(profiler.profiler.kineto_results.experimental_event_tree())):  # type: ignore[union-attr]
        now += size
        highest = max(highest, now)
    return highest


def _here(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor that processes share."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _allocations(events: Sequence[Any]) -> list[tuple[int, int]]:
    """(time, bytes) of every allocation and, negative, release."""
    found = []
    stack = list(events)
    while stack:
        event = stack.pop()
        stack += event.children
        if event.tag == torch_internals.ALLOCATION:
            found.append((event.start_time_ns, event.extra_fields.alloc_size))
    return found
