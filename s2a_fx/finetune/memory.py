"""What a run will take, and what it took."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from s2a_fx.analyze import compare
from s2a_fx.finetune.distributed import Processes
from s2a_fx.finetune.model import batch_norms, build_model, data_config
from s2a_fx.finetune.objective import make_loss, make_optimizer
from s2a_fx.finetune.options import FinetuneOptions
from s2a_fx.finetune.steps import Precision
from s2a_fx.finetune.units import make_units
from s2a_fx.graph.capture import trace
from s2a_fx.graph.structure import residual_blocks
from s2a_fx.recipes import GraphPass
from s2a_fx.report import MB, MemoryReport
from s2a_fx.transform import transform
from s2a_fx.zoo import on_meta

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Prediction:
    """What a step takes on the device, in bytes.

    Attributes:
        report: of one step in a process that is alone.
        peak_bytes: of this process.
        beside: the images that stand beside the step that the report simulates: the next batch, and with `channels_last` the one
            that is laid out anew.
        caveats: what the figure does not tell to the byte.
    """

    report: MemoryReport
    peak_bytes: int
    beside: int
    caveats: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        return self.peak_bytes + self.beside

    def __str__(self) -> str:
        r = self.report
        told = (
            f"{r.title()}\n{r.recipe}: trains {r.trainable_parameters / 1e6:.3f} M parameters ({r.trainable_percent:.2f} %), "
            f"keeps {r.saved_bytes / MB:,.1f} MB, peaks at {self.peak_bytes / MB:,.1f} MB; "
            f"with the images beside it {self.bytes / MB:,.1f} MB"
        )
        return "\n".join((told, *self.caveats))


def predict(options: FinetuneOptions, classes: int, processes: Processes) -> Prediction:
    """Simulate a step of the run on a model without weights.

    Raises:
        S2AError: model, recipe, image size or optimizer do not fit.
    """
    with on_meta():
        model, _ = build_model(options, classes, weights=False)
    model.train()
    for path in batch_norms(model) if options.freeze_batch_norm else ():
        model.get_submodule(path).eval()
    x = torch.empty(options.batch_size, *data_config(model, options)["input_size"], device="meta")
    device = processes.device.type
    with Precision("cpu", options.amp).autocast():  # fake tensors lie on the CPU, whatever device they stand for
        report = compare(
            model,
            x,
            [options.recipe],
            device=device,
            optimizer=_optimizer(options, device),
            loss=_loss(options, classes),
            name=options.model,
            modes=["compile" if options.compile else "eager"],
        ).reports[0]
    peak, caveats = report.peak_bytes, []
    if processes.parallel == "fsdp":
        stand = options.grad_accumulation > 1
        peak = _sharded_peak(report, _unit_bytes(model, x, options.recipe), processes.count, stand)
        caveats.append(f"an upper estimate: weights, gradients and optimizer state in {processes.count} shares, blocks gathered")
    elif processes.parallel == "ddp" or options.grad_accumulation > 1:
        peak = _peak_beside_gradients(report, max(4 * p.numel() for p in model.parameters()))
    if options.compile:
        caveats.append("an upper estimate: operators count one by one, and the compiler fuses them")
    if options.amp and device == "cuda":
        caveats.append("a low estimate: norms and softmax, which autocast runs in float32 on a GPU, count in half precision")
    return Prediction(report, peak, 4 * x.numel() * (2 if options.channels_last else 1), tuple(caveats))


def _loss(options: FinetuneOptions, classes: int) -> Callable[[torch.Tensor], torch.Tensor]:
    given = make_loss(options)
    soft = bool(options.mixup or options.cutmix)

    def loss(output: torch.Tensor) -> torch.Tensor:
        targets = torch.zeros(output.shape[0], *((classes,) if soft else ()), device=output.device)
        return given(output, targets if soft else targets.long())  # type: ignore[no-any-return]

    return loss


def _optimizer(options: FinetuneOptions, device: str) -> str | Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    """What the simulation is to step with: AdamW by its name, which is quicker, as timm's has torch's defaults."""
    if options.optimizer == "adamw":
        return options.optimizer

    def made(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = make_optimizer(parameters, options)
        for group in optimizer.param_groups:
            if group.get("foreach", False) is None:  # torch would ask the fake tensors, which lie on the CPU
                group["foreach"] = device == "cuda"
        return optimizer

    made.__name__ = options.optimizer
    return made


def _peak_beside_gradients(report: MemoryReport, largest: int) -> int:
    """The peak if all gradients stand from step to step, in DDP's buckets or to be added up, and the largest is being added."""
    trained = 4 * report.trainable_parameters
    return max(m.bytes - m.of("gradient") for m in report.timeline) + trained + min(largest, trained)


def _unit_bytes(model: nn.Module, x: torch.Tensor, recipe: str | Sequence[GraphPass]) -> list[int]:
    """Bytes of the weights that FSDP2 gathers together: those of each block, and last those outside."""
    gm = transform(model, x, recipe)
    units = make_units(gm, [block.path for block in residual_blocks(trace(model, x))])
    inside = [sum(4 * p.numel() for p in unit.parameters()) for unit in units]
    return [*inside, sum(4 * p.numel() for p in gm.parameters()) - sum(inside)]


def _sharded_peak(report: MemoryReport, units: list[int], count: int, gradients_stand: bool) -> int:
    """At most what a process of FSDP2's takes: its shares, and whole weights and gradients of a block and of what is outside.

    To the weights belong those of the next block and the buffer that they come in, to the gradients the buffer that they leave by.
    `gradients_stand`: whole from batch to batch, until those of the last are added up with the other processes'.
    """
    *blocks, outside = units
    largest = max(blocks, default=0)
    weights = outside + largest + 2 * max(largest, outside)
    trained = 4 * report.trainable_parameters
    gradients = 2 * min(outside + largest, trained) + (trained if gradients_stand else 0)
    shared = [sum(m.of(kind) for kind in ("parameter", "gradient", "optimizer")) for m in report.timeline]
    alone = max(m.bytes - of_all + -(-of_all // count) for m, of_all in zip(report.timeline, shared, strict=True))
    return alone + weights + gradients


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
        before = _resident("VmHWM")
    except OSError:
        return lambda: None
    return lambda: _resident("VmHWM") - before


def _resident(name: str) -> int:
    fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(fields[name].split()[0]) * 1024
