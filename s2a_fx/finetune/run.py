"""A fine-tuning run from the options to the best weights."""

import time
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.utils import random_seed
from torch import nn

from s2a_fx.errors import InputError, PassError
from s2a_fx.finetune.checkpoint import BEST, LAST, TASK, Epoch, Position, State, require
from s2a_fx.finetune.claim import LOCK, claimed
from s2a_fx.finetune.data import DataSets, make_loader, make_mixup, open_data
from s2a_fx.finetune.distributed import Processes, joined, shared
from s2a_fx.finetune.free_memory import free_bytes
from s2a_fx.finetune.interrupts import interrupts
from s2a_fx.finetune.memory import Prediction, high_water, predict
from s2a_fx.finetune.model import batch_norms, build_model, data_config
from s2a_fx.finetune.objective import make_loss, make_optimizer, make_scheduler, no_decay
from s2a_fx.finetune.options import FinetuneOptions
from s2a_fx.finetune.steps import Precision
from s2a_fx.finetune.training import Say, Training
from s2a_fx.finetune.workers import check_workers
from s2a_fx.graph.capture import trace
from s2a_fx.graph.structure import residual_blocks
from s2a_fx.recipes import resolve
from s2a_fx.report import MB
from s2a_fx.tasks.base_digests import digests, fingerprint
from s2a_fx.transform import transform
from s2a_fx.whole_file import destination


@dataclass(frozen=True)
class FinetuneResult:
    """What came of a run.

    Attributes:
        epochs: all of them, those before a resumption included.
        predicted_bytes, measured_bytes: the most that stood on the device; measured since this process built the model, None
            where the system does not tell (see `memory.high_water`).
        seconds: of training and evaluation in this process.
        folder: where the checkpoints are.
    """

    epochs: tuple[Epoch, ...]
    predicted_bytes: int
    measured_bytes: int | None
    seconds: float
    folder: Path

    @property
    def best(self) -> Epoch:
        """The epoch of the highest accuracy, the first of several."""
        return Position(self.epochs).best


def finetune(options: FinetuneOptions, say: Say = lambda line: None) -> FinetuneResult:
    """Fine-tune a model on a data set; checkpoints are written into the output folder.

    Args:
        say: called with each line that a person may want to read.

    Raises:
        S2AError: something asked for cannot be, and nothing was written; or the run diverged or the disk is full, and the last good
            checkpoint stays.
        Stopped: interrupted by Ctrl-C or SIGTERM; the last checkpoint holds all that was done. A second Ctrl-C stops at once.
    """
    with joined(options.device, options.parallel) as processes, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)  # `check_workers` says it, by the cgroups too
        return _finetune(options, processes, say if processes.first else lambda line: None)


def _finetune(options: FinetuneOptions, processes: Processes, say: Say) -> FinetuneResult:
    resolve(options.recipe)
    if options.compile and processes.parallel == "fsdp":
        raise InputError("compile: is not supported with parallel 'fsdp'; leave one out.")
    check_workers(options.workers, processes.first)
    processes.of_first(lambda: _check_folder(options))
    data = open_data(options, processes)
    say(f"{options.data}: {data.classes} classes, {len(data.train):,} images to train on, {len(data.val):,} to evaluate on")
    prediction = predict(options, data.classes, processes)
    say(str(prediction))
    _check_fit(prediction, options, processes, say)
    measured = high_water(processes.device)
    run = _prepare(options, data, processes, say)
    with ExitStack() as held:
        processes.of_first(lambda: held.enter_context(claimed(options.folder)))
        processes.of_first(lambda: _check_folder(options))  # again: another run may have come and gone
        position = run.begin()
        started = time.perf_counter()
        with interrupts() as asked:
            position = run.train(position, prediction, measured, asked)
            run.keep_best()
    seconds = time.perf_counter() - started
    result = FinetuneResult(position.epochs, prediction.bytes, measured(), seconds, options.folder)
    _say_result(result, processes, say)
    return result


def _check_folder(options: FinetuneOptions) -> None:
    last = options.folder / LAST
    try:
        stands = last.exists()
    except OSError as error:
        raise InputError(f"{options.folder}: cannot be looked into: {error.strerror}; give another --output.") from error
    _check_files(options.folder)
    if options.resume:
        require(last)
    elif stands:
        raise InputError(f"{last}: a run stands there already; go on with --resume, or give another --output.")


def _check_files(folder: Path) -> None:
    """Refuse a folder whose files the run cannot replace. It reads what it wrote, so pipes and devices will not do."""
    if not folder.exists():
        return
    for file in (folder / name for name in (LAST, BEST, TASK, LOCK)):
        try:
            found = destination(file)
        except OSError as error:
            raise InputError(f"{file}: cannot be written: {error.strerror}; give another --output.") from error
        if not found.is_replaced:
            raise InputError(f"{file}: is {found.kind}, wanted a plain file or none; take it away, or give another --output.")


def _check_fit(prediction: Prediction, options: FinetuneOptions, processes: Processes, say: Say) -> None:
    budget = free_bytes(processes.device) if options.memory is None else options.memory
    whose = f"free on {processes.device}" if options.memory is None else "allowed"
    found = f"{prediction.bytes / MB:,.1f} of {budget / MB:,.1f} MB {whose}"
    if prediction.bytes <= budget:
        say(f"it fits: {found}")
        return
    if not options.force:
        raise InputError(
            f"it does not fit: {found}. Take a smaller --batch-size with more --grad-accumulation, --recipe s2a-max, or --force."
        )
    say(f"it does not fit, and is forced: {found}")


def _prepare(options: FinetuneOptions, data: DataSets, processes: Processes, say: Say) -> Training:
    random_seed(options.seed)
    model, new = build_model(options, data.classes)
    if new:
        say(f"the weights given are for another head: {', '.join(new)} begin at zero")
    config = data_config(model, options)
    loaders = [make_loader(d, config, options, processes, processes.device, d is data.train) for d in (data.train, data.val)]
    if len(loaders[0]) < options.grad_accumulation:
        raise InputError(
            f"batch_size: {len(data.train)} training images do not fill one step of {options.grad_accumulation} x "
            f"{options.batch_size} in each of {processes.count} processes; take a smaller one."
        )
    norms = batch_norms(model) if options.freeze_batch_norm else ()
    x = torch.empty(options.batch_size, *config["input_size"], device="meta")
    blocks = [block.path for block in residual_blocks(trace(model, x))] if processes.parallel == "fsdp" else []
    gm = transform(model, x, options.recipe).train()
    if not any(p.requires_grad for p in gm.parameters()):
        raise PassError(f"recipe {options.recipe!r}: nothing of {options.model} is left to train; take another.")
    base = fingerprint(digests({n: p for n, p in gm.named_parameters() if not p.requires_grad}))
    gm.to(processes.device)
    if options.channels_last and processes.parallel != "fsdp":  # FSDP2 takes weights by rows alone; the images' layout decides
        gm.to(memory_format=torch.channels_last)
    wrapped = shared(gm, processes, blocks)
    optimizer = make_optimizer(gm, options, no_decay(model))
    frozen_norms = tuple(gm.get_submodule(path) for path in norms)
    updates = len(loaders[0]) // options.grad_accumulation
    scheduler = make_scheduler(optimizer, options, updates)
    precision = Precision(processes.device.type, options.amp)
    names = None if data.class_names is None else list(data.class_names)
    described = {**options.of_the_result(), "processes": processes.count, "images": len(data.train), "class_names": names}
    return Training(
        options=options,
        processes=processes,
        data=data,
        model=torch.compile(wrapped) if options.compile else wrapped,  # type: ignore[arg-type]
        state=State(gm, optimizer, precision.scaler, described, base),
        scheduler=scheduler,
        updates_per_epoch=updates,
        loss=make_loss(options),
        mixup=make_mixup(options, data.classes),
        precision=precision,
        frozen_norms=frozen_norms,
        statistics=_statistics(gm, frozen_norms),
        train_loader=loaders[0],
        val_loader=loaders[1],
        say=say,
    )


def _statistics(gm: nn.Module, frozen_norms: tuple[nn.Module, ...]) -> tuple[torch.Tensor, ...]:
    kept = {id(buffer) for norm in frozen_norms for buffer in norm.buffers()}
    named = ("running_mean", "running_var")
    return tuple(b for name, b in gm.named_buffers() if name.rpartition(".")[2] in named and id(b) not in kept)


def _say_result(result: FinetuneResult, processes: Processes, say: Say) -> None:
    best = result.best
    say(f"best: epoch {best.number}, top-1 {best.accuracy.top1:.2%}, balanced {best.accuracy.balanced:.2%}")
    predicted = f"{result.predicted_bytes / MB:,.1f} MB predicted"
    took = "none measured" if result.measured_bytes is None else f"{result.measured_bytes / MB:,.1f} MB measured"
    if processes.device.type == "cpu":
        took += " (by which the process grew, libraries and the compilation of kernels included)"
    say(f"peak: {predicted}, {took}; {result.seconds:,.0f} s; {result.folder}/{TASK}")
