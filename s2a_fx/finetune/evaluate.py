"""Accuracy on a split."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from s2a_fx.errors import InputError
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
    """Accuracy of `model` over all processes' batches; each of its modules is left in the mode that it came in.

    Args:
        batches: images (B, C, H, W) and targets (B,), on the model's device.
        classes: how many.
        images: of all processes; what this process's batches hold beyond its share was repeated to make them whole, and is not
            counted. None counts all.
        processes: whose counts are added up; None for this one.

    Raises:
        InputError: there are no batches, or a target is no class.
    """
    precision, processes = precision or Precision(), processes or Processes()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    own = None if images is None else len(range(processes.rank, images, processes.count))
    seen, counts = 0, None  # (right, all) of each class
    with _evaluating(model):
        for x, targets in batches:
            with precision.autocast():
                found = model(x.contiguous(memory_format=layout)).argmax(1)
            keep = slice(None if own is None else max(own - seen, 0))
            found, targets, seen = found[keep], targets[keep], seen + len(targets)
            total = _by_class(targets, classes)
            of_classes = torch.stack([_by_class(targets[found == targets], classes), total])
            counts = of_classes if counts is None else counts + of_classes
    if counts is None:
        raise InputError("batches: got none, wanted one at least; an iterator that was read already has none left.")
    right, total = processes.added(counts).double()
    present = total > 0
    return Accuracy((right.sum() / total.sum()).item(), (right[present] / total[present]).mean().item())


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; afterwards each module is in its own mode again: a frozen norm stays frozen."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        model.train(modes[model])  # by the modules' own `train`, which may do more than set the mode
        for module, training in modes.items():
            module.training = training


def _by_class(targets: torch.Tensor, classes: int) -> torch.Tensor:
    """How many targets each class has."""
    if targets.ndim != 1 or targets.is_floating_point():
        got = f"{targets.dtype} of shape {list(targets.shape)}"
        raise InputError(f"targets: got {got}, wanted one class index for each image, 0 to {classes - 1}.")
    least, most = (int(t) for t in targets.aminmax()) if len(targets) else (0, 0)
    if least < 0 or most >= classes:
        strange = least if least < 0 else most
        raise InputError(f"targets: got class {strange}, wanted 0 to {classes - 1}; say how many classes the data has.")
    return torch.bincount(targets, minlength=classes)
