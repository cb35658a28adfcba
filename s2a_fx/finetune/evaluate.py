"""Accuracy on a split."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from s2a_fx.finetune.distributed import Processes
from s2a_fx.finetune.steps import Precision


@dataclass(frozen=True)
class Accuracy:
    """Shares, 0 to 1: of all images that are right (`top1`), and the mean over classes of their images' (`balanced`)."""

    top1: float
    balanced: float


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    classes: int,
    *,
    images: int | None = None,
    precision: Precision | None = None,
    channels_last: bool = False,
    processes: Processes | None = None,
) -> Accuracy:
    """Accuracy of `model` over all processes' batches; it is left in the mode that it came in.

    Args:
        batches: images (B, C, H, W) and targets (B,), on the model's device.
        classes: how many.
        images: of all processes; what this process's batches hold beyond its share was repeated to make them whole, and is not
            counted. None counts all.
        processes: whose counts are added up; None for this one.
    """
    precision, processes = precision or Precision(), processes or Processes()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    own = None if images is None else len(range(processes.rank, images, processes.count))
    training, seen = model.training, 0
    model.eval()
    counts = None  # (right, all) of each class
    for x, targets in batches:
        with precision.autocast():
            found = model(x.contiguous(memory_format=layout)).argmax(1)
        keep = slice(None if own is None else max(own - seen, 0))
        found, targets, seen = found[keep], targets[keep], seen + len(targets)
        of_classes = [torch.bincount(t, minlength=classes) for t in (targets[found == targets], targets)]
        counts = torch.stack(of_classes) if counts is None else counts + torch.stack(of_classes)
    model.train(training)
    assert counts is not None
    right, total = processes.added(counts).double()
    present = total > 0
    return Accuracy((right.sum() / total.sum()).item(), (right[present] / total[present]).mean().item())
