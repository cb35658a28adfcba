"""Training steps."""

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import nn

from s2a_fx.finetune.distributed import without_sync


@dataclass(frozen=True)
class Precision:
    """How the forward computes: `amp` is a dtype's name for autocast, or None for the weights' own.

    Attributes:
        device: the kind of device, `cpu` or `cuda`.
        scaler: scales losses of float16, whose gradients would vanish; does nothing otherwise.
    """

    device: str = "cpu"
    amp: str | None = None
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scaler", torch.amp.GradScaler(self.device, enabled=self.amp == "float16"))

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of a forward."""
        return torch.autocast(self.device, dtype=getattr(torch, self.amp or "bfloat16"), enabled=self.amp is not None)


def training_steps(
    model: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    optimizer: torch.optim.Optimizer,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    precision: Precision | None = None,
    accumulation: int = 1,
    channels_last: bool = False,
    after_update: Callable[[], None] = lambda: None,
) -> Iterator[torch.Tensor]:
    """Train on the batches; after each update of the weights, yield its mean loss, detached, on the model's device.

    Args:
        model: in train mode; may be wrapped by DDP or FSDP2, or compiled.
        batches: images (B, C, H, W) and targets, (B,) or (B, classes), on the model's device.
        accumulation: batches in an update; those that are left over at the end are not trained on, and not run at all if `batches`
            has a length.
        after_update: called after each update, before it is yielded: for a scheduler.
    """
    precision = precision or Precision()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    if isinstance(batches, Sized):
        batches = islice(batches, len(batches) // accumulation * accumulation)
    losses: list[torch.Tensor] = []
    optimizer.zero_grad()
    for images, targets in batches:
        complete = len(losses) + 1 == accumulation
        with without_sync(model, not complete):
            with precision.autocast():
                value = loss(model(images.contiguous(memory_format=layout)), targets) / accumulation
            precision.scaler.scale(value).backward()
        losses.append(value.detach())
        del value, images, targets  # nothing of a step stands beside the next one's
        if complete:
            precision.scaler.step(optimizer)
            precision.scaler.update()
            optimizer.zero_grad()
            after_update()
            yield torch.stack(losses).sum()
            losses.clear()
    optimizer.zero_grad()
