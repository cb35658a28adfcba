"""Whole training steps of every method side by side: what each keeps, peaks at, and costs in time.

    python benchmarks/step.py [--models ...] [--methods ...] [--batch-size 8] [--peak-batch-size 32] [--rounds 7]
                              [--device cuda] [--dtype bfloat16] [--amp] [--jobs 12]

A step is forward, cross-entropy, backward, AdamW, `zero_grad(set_to_none=True)`.

1. Memory: one method at a time in a process, everything else freed; bytes held for the backward from saved-tensor hooks, the peak
   from the allocator: its events on the CPU, `max_memory_allocated` on CUDA less cuBLAS's workspaces, which are told apart.
   `--jobs` processes measure at a time, before anything is timed.
2. Time: all methods in one process, one after the other in every round, so that whatever slows the machine slows them alike; the
   median over the rounds of each method's time divided by that of `full`, and of `bias+checkpoint`, in the same round.

On a CPU with other work on it run with OMP_NUM_THREADS=1: threads that wait for one another make a step ten times slower.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import record
import timm
import torch
import torch.nn.functional as F
from methods import METHODS
from tabulate import tabulate
from torch import nn

import s2a_fx
from s2a_fx.analysis.measure import measure_peak_bytes, measure_saved_bytes
from s2a_fx.fork_map import fork_map

MODELS = ["vit_base_patch16_224", "swin_base_patch4_window7_224", "convnext_base", "resnet50"]
WARM_UP = 2
LEARNING_RATE = 1e-6
"""So small that the last step computes on the same values as the first: no overfitted loss, no denormal gradients."""
STEPS_A_ROUND = {"cpu": 1, "cuda": 5}


@dataclass(frozen=True)
class Setting:
    """How every method is run. `dtype`: of weights and input; `amp`: autocast to bfloat16 instead; `classes`: of the head."""

    device: str
    dtype: str
    amp: bool
    classes: int


@dataclass(frozen=True)
class Memory:
    """Bytes; `predicted` by s2a_fx.analyze, None where a method cannot be traced or runs under autocast.

    `workspace`: what cuBLAS's workspaces take, which `peak_measured` leaves out.
    """

    trained_percent: float
    saved_predicted: int | None = None
    peak_predicted: int | None = None
    saved_measured: int | None = None
    peak_measured: int | None = None
    workspace: int = 0


@dataclass(frozen=True)
class Row:
    """One method on one model; a field is None where it was not asked for or cannot be had."""

    model: str
    method: str
    batch_size: int
    peak_batch_size: int
    memory: Memory
    peak_over_full: float | None
    seconds: float | None
    time_over_full: float | None
    time_over_full_range: tuple[float, float] | None
    time_over_checkpoint: float | None


class Autocast(nn.Module):
    """`model` under autocast to bfloat16."""

    def __init__(self, model: nn.Module, device: str) -> None:
        super().__init__()
        self.model, self.device = model, device

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device, torch.bfloat16):
            return self.model(x)


def build(name: str, method: str, setting: Setting, batch_size: int) -> tuple[nn.Module, torch.Tensor, float]:
    """A fresh model made trainable by `method`, on the CPU, an input, and its trained parameters in percent of the model's own."""
    torch.manual_seed(0)
    dtype = getattr(torch, setting.dtype)
    model = timm.create_model(name, num_classes=setting.classes).to(dtype).train()
    total = sum(p.numel() for p in model.parameters())
    config: Any = model.pretrained_cfg
    x = torch.randn(batch_size, *config["input_size"]).to(dtype)
    model = METHODS[method](model, x)
    return model, x, 100 * sum(p.numel() for p in model.parameters() if p.requires_grad) / total


def placed(model: nn.Module, setting: Setting) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = model.to(setting.device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    return Autocast(model, setting.device) if setting.amp else model, optimizer


def train_step(model: nn.Module, x: torch.Tensor, labels: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    F.cross_entropy(model(x).float(), labels).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def measure(name: str, method: str, setting: Setting, batch_size: int) -> Memory:
    """Saved bytes and the peak of a step in a steady state, predicted and measured."""
    model, x, trained = build(name, method, setting, batch_size or 2)
    if not batch_size:
        return Memory(trained)
    report = None
    if not setting.amp:
        try:
            report = s2a_fx.analyze(model, x, device=setting.device)
        except s2a_fx.S2AError as error:
            print(f"{name}, {method}: not predicted: {error}", flush=True)
    saved, peak = (report.saved_bytes, report.peak_bytes) if report else (None, None)
    del report
    gc.collect()
    model, optimizer = placed(model, setting)
    x = x.to(setting.device)
    labels = torch.zeros(batch_size, dtype=torch.long, device=setting.device)
    kept = measure_saved_bytes(model, (x,))
    if setting.device == "cpu":
        return Memory(trained, saved, peak, kept, measure_peak_bytes(model, (x,), optimizer))
    for _ in range(WARM_UP):
        train_step(model, x, labels, optimizer)
    torch.cuda.reset_peak_memory_stats()
    train_step(model, x, labels, optimizer)
    torch.cuda.synchronize()
    highest = torch.cuda.max_memory_allocated()
    del model, optimizer, x, labels
    gc.collect()
    workspace = torch.cuda.memory_allocated()  # nothing else is left
    return Memory(trained, saved, peak, kept, highest - workspace, workspace)


def measured(name: str, method: str, setting: Setting, batch_size: int) -> Memory | str:
    """`measure`, or why not."""
    try:
        return measure(name, method, setting, batch_size)
    except (s2a_fx.S2AError, RuntimeError) as error:  # no target for LoRA, no PEFT, no memory: the others still run
        reason = f"{name}, {method}: {type(error).__name__}: {error}"
        print("left out:", reason, flush=True)
        return reason
    finally:
        gc.collect()


def measure_times(
    name: str, methods: list[str], setting: Setting, batch_size: int, rounds: int
) -> tuple[dict[str, list[float]], list[str]]:
    """Method -> seconds a step in every round, and which methods are left out and why."""
    synchronize: Callable[[], None] = torch.cuda.synchronize if setting.device == "cuda" else lambda: None
    steps = STEPS_A_ROUND[setting.device]
    labels = torch.zeros(batch_size, dtype=torch.long, device=setting.device)
    runs = {}
    left_out = []
    for method in methods:
        try:
            model, x, _ = build(name, method, setting, batch_size)
            model, optimizer = placed(model, setting)
            run = model, x.to(setting.device), labels, optimizer
            for _ in range(WARM_UP):
                train_step(*run)
        except RuntimeError as error:
            left_out.append(f"{name}, {method}, timed: {type(error).__name__}: {error}")
            print("left out:", left_out[-1], flush=True)
            continue
        runs[method] = run
    seconds: dict[str, list[float]] = {method: [] for method in runs}
    for turn in range(rounds):
        for method in runs if turn % 2 == 0 else reversed(runs):
            synchronize()
            start = time.perf_counter()
            for _ in range(steps):
                train_step(*runs[method])
            synchronize()
            seconds[method].append((time.perf_counter() - start) / steps)
    return seconds, left_out


def rows_of(
    name: str, memory: dict[str, Memory], seconds: dict[str, list[float]], batch_size: int, peak_batch_size: int
) -> list[Row]:
    """A row for each method."""
    rows = []
    for method, kept in memory.items():
        over_full = _ratios(seconds, method, "full")
        over_checkpoint = _ratios(seconds, method, "bias+checkpoint")
        full_peak = memory["full"].peak_measured if "full" in memory else None
        rows.append(
            Row(
                model=name,
                method=method,
                batch_size=batch_size,
                peak_batch_size=peak_batch_size,
                memory=kept,
                peak_over_full=kept.peak_measured / full_peak if kept.peak_measured and full_peak else None,
                seconds=statistics.median(seconds[method]) if method in seconds else None,
                time_over_full=statistics.median(over_full) if over_full else None,
                time_over_full_range=(min(over_full), max(over_full)) if over_full else None,
                time_over_checkpoint=statistics.median(over_checkpoint) if over_checkpoint else None,
            )
        )
    return rows


def _ratios(seconds: dict[str, list[float]], method: str, reference: str) -> list[float]:
    if method not in seconds or reference not in seconds:
        return []
    return [a / b for a, b in zip(seconds[method], seconds[reference], strict=True)]


def table(rows: list[Row]) -> str:
    def mb(count: int | None) -> float | None:
        return None if count is None else count / 1e6

    columns = {
        "method": [r.method for r in rows],
        "trained %": [r.memory.trained_percent for r in rows],
        "saved MB": [mb(r.memory.saved_measured) for r in rows],
        "predicted peak MB": [mb(r.memory.peak_predicted) for r in rows],
        "measured peak MB": [mb(r.memory.peak_measured) for r in rows],
        "peak / full": [r.peak_over_full for r in rows],
        "time / full": [r.time_over_full for r in rows],
        "time / bias+checkpoint": [r.time_over_checkpoint for r in rows],
    }
    return tabulate(columns, headers="keys", floatfmt=("", ".2f", ",.1f", ",.1f", ",.1f", ".3f", ".2f", ".2f"), missingval="-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--batch-size", type=int, default=8, help="of the timed steps")
    parser.add_argument("--peak-batch-size", type=int, help="of the measured peaks; 0 skips them; default: --batch-size")
    parser.add_argument("--rounds", type=int, default=7, help="of timed steps; 0 skips them")
    parser.add_argument("--device", choices=list(STEPS_A_ROUND), default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--amp", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=1, help="processes that measure memory at a time (default: %(default)s)")
    parser.add_argument("--name", default="step", help="of the JSON in benchmarks/results (default: %(default)s)")
    options = parser.parse_args()
    peak_batch_size = options.batch_size if options.peak_batch_size is None else options.peak_batch_size
    setting = Setting(options.device, options.dtype, options.amp, options.classes)
    pairs = [(name, method) for name in options.models for method in options.methods]
    # all before this process has used CUDA: it forks
    found = dict(zip(pairs, fork_map(lambda pair: measured(*pair, setting, peak_batch_size), pairs, options.jobs), strict=True))
    processor = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    missing = [reason for reason in found.values() if isinstance(reason, str)]
    rows: dict[str, list[Row]] = {}
    memory: dict[str, dict[str, Memory]] = {name: {} for name in options.models}
    for (name, method), kept in found.items():
        if isinstance(kept, Memory):
            memory[name][method] = kept

    def write() -> Path:
        figures = {
            "setting": {**asdict(setting), "processor": processor, "rounds": options.rounds},
            "rows": [asdict(row) for name in options.models for row in rows[name]],
            "left_out": missing,
        }
        return record.write(options.name, figures, options.device)

    for name in options.models:
        rows[name] = rows_of(name, memory[name], {}, options.batch_size, peak_batch_size)
    path = write()
    for name in options.models:
        if options.rounds:
            seconds, left_out = measure_times(name, list(memory[name]), setting, options.batch_size, options.rounds)
            missing += left_out
            rows[name] = rows_of(name, memory[name], seconds, options.batch_size, peak_batch_size)
            gc.collect()
        precision = "autocast to bfloat16" if setting.amp else setting.dtype
        print(f"\n{name}, {precision}, {processor}: time at batch {options.batch_size}, peak at batch {peak_batch_size}")
        print(table(rows[name]), flush=True)
        path = write()  # after every model: a long run that is cut off has left what it knows
    print(path)


if __name__ == "__main__":
    main()
