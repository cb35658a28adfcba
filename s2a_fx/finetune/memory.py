"""What a run will take, what there is, and what it took."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from s2a_fx.analysis.optimizer import OPTIMIZERS
from s2a_fx.analyze import compare
from s2a_fx.finetune.model import build_model, data_config
from s2a_fx.finetune.objective import make_loss, make_optimizer
from s2a_fx.finetune.options import FinetuneOptions
from s2a_fx.finetune.steps import Precision
from s2a_fx.report import MB, MemoryReport
from s2a_fx.zoo import on_meta

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Prediction:
    """What a step takes on the device, in bytes.

    Attributes:
        report: of one step.
        beside: what stands beside the step that the report simulates: the next batch of images, and gradients that
            are added up over several batches.
    """

    report: MemoryReport
    beside: int

    @property
    def bytes(self) -> int:
        return self.report.peak_bytes + self.beside

    def __str__(self) -> str:
        r = self.report
        return (
            f"{r.title()}\n{r.recipe}: trains {r.trainable_parameters / 1e6:.3f} M parameters ({r.trainable_percent:.2f} %), "
            f"keeps {r.saved_bytes / MB:,.1f} MB, peaks at {r.peak_bytes / MB:,.1f} MB; "
            f"with the next batch of images {self.bytes / MB:,.1f} MB"
        )


def predict(options: FinetuneOptions, classes: int, device: torch.device) -> Prediction:
    """Simulate a step of the run on a model without weights.

    Raises:
        S2AError: model, recipe, image size or optimizer do not fit.
    """
    with on_meta():
        model, _ = build_model(options, classes, weights=False)
    x = torch.empty(options.batch_size, *data_config(model, options)["input_size"], device="meta")
    given = make_loss(options)
    soft = bool(options.mixup or options.cutmix)

    def loss(output: torch.Tensor) -> torch.Tensor:
        targets = torch.zeros(output.shape[0], *((classes,) if soft else ()), device=output.device)
        return given(output, targets if soft else targets.long())  # type: ignore[no-any-return]

    named = options.optimizer if options.optimizer in OPTIMIZERS else lambda parameters: make_optimizer(parameters, options)
    with Precision("cpu", options.amp).autocast():  # fake tensors lie on the CPU, whatever device they stand for
        report = compare(
            model.train(), x, [options.recipe], device=device.type, optimizer=named, loss=loss, name=options.model
        ).reports[0]
    gradients = 4 * report.trainable_parameters if options.grad_accumulation > 1 else 0
    return Prediction(report, 4 * x.numel() + gradients)


def free_bytes(device: torch.device) -> int:
    """What is free on the device now, in bytes; on the CPU, what the system can give without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def high_water(device: torch.device) -> Callable[[], int | None]:
    """Begin to measure; the function tells the most bytes that stood on the device since, None where no system tells.

    On a GPU it is what torch's allocator gave out. On the CPU it is by how much the resident set grew, so that libraries that
    are loaded later and memory that the allocator holds back are in it.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: torch.cuda.max_memory_allocated(device)
    try:
        _CLEAR.write_text("5")  # Linux: the high-water mark is set back to what is resident now
        before = _resident("VmRSS")
    except OSError:
        return lambda: None
    return lambda: _resident("VmHWM") - before


def _resident(name: str) -> int:
    fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(fields[name].split()[0]) * 1024
