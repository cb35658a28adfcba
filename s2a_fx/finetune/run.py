"""A fine-tuning run from the options to the best weights."""

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup
from timm.utils import random_seed
from torch import nn
from tqdm import tqdm

from s2a_fx.analysis.blocks import residual_blocks
from s2a_fx.errors import InputError, PassError
from s2a_fx.finetune.checkpoint import BEST, LAST, TASK, Epoch, Position, State, read, require, write
from s2a_fx.finetune.claim import claimed
from s2a_fx.finetune.data import DataSets, Loader, make_loader, make_mixup, open_data, training_batches
from s2a_fx.finetune.distributed import Processes, joined, shared
from s2a_fx.finetune.evaluate import evaluate
from s2a_fx.finetune.free_memory import free_bytes
from s2a_fx.finetune.interrupts import Interrupts, Stopped, interrupts
from s2a_fx.finetune.memory import Prediction, high_water, predict
from s2a_fx.finetune.model import batch_norms, build_model, data_config
from s2a_fx.finetune.objective import make_loss, make_optimizer, make_scheduler, no_decay
from s2a_fx.finetune.options import FinetuneOptions
from s2a_fx.finetune.steps import Precision, training_steps
from s2a_fx.recipes import resolve
from s2a_fx.report import MB
from s2a_fx.tasks.adapter import save_adapter
from s2a_fx.tasks.base_digests import digests, fingerprint
from s2a_fx.trace import trace
from s2a_fx.transform import transform

Say = Callable[[str], None]

_ASK_EVERY = 10
"""Updates after which several processes ask each other whether to stop: each question waits for all that was begun."""


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
        S2AError: something asked for cannot be; nothing was written.
        Stopped: interrupted by Ctrl-C or SIGTERM; the last checkpoint holds all that was done. A second Ctrl-C stops at once.
    """
    with joined(options.device, options.parallel) as processes:
        return _finetune(options, processes, say if processes.first else lambda line: None)


def _finetune(options: FinetuneOptions, processes: Processes, say: Say) -> FinetuneResult:
    resolve(options.recipe)
    if options.compile and processes.parallel == "fsdp":
        raise InputError("compile: is not supported with parallel 'fsdp'; leave one out.")
    processes.of_first(lambda: _check_folder(options))
    data = open_data(options, processes)
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
    if options.resume:
        require(last)
    elif last.exists():
        raise InputError(f"{last}: a run stands there already; go on with --resume, or give another --output.")


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


@dataclass(frozen=True)
class _Run:
    """All that a run works with."""

    options: FinetuneOptions
    processes: Processes
    data: DataSets
    model: nn.Module  # what is called to train: the graph, wrapped
    state: State
    scheduler: Any
    updates_per_epoch: int
    loss: nn.Module
    mixup: Mixup | None
    precision: Precision
    frozen_norms: tuple[nn.Module, ...]
    statistics: tuple[torch.Tensor, ...]  # of the other batch norms: what each process measures on its own images
    train_loader: Loader
    val_loader: Loader
    say: Say

    @property
    def images_per_update(self) -> int:
        return self.options.batch_size * self.options.grad_accumulation * self.processes.count

    def begin(self) -> Position:
        """Take over the last checkpoint, or write the first."""
        position = Position()
        if self.options.resume:
            position = self.state.restore(self.processes.of_first(self._stored))
            self.say(f"resumed: {len(position.epochs)} epochs and {position.updates} steps were done")
        else:
            self.save(position)  # a folder that cannot be written is told now, and a run can be killed at once
        return position

    def _stored(self) -> dict[str, Any]:
        """The last checkpoint; the best is looked at, too: it is wanted at the end."""
        last, best = (self.options.folder / name for name in (LAST, BEST))
        record = read(last)
        self.state.check(record, last)
        if record["position"]["epochs"]:
            self.state.check(read(best), best)
        return record

    def train(self, position: Position, prediction: Prediction, measured: Callable[[], int | None], asked: Interrupts) -> Position:
        """All epochs that are left."""
        while len(position.epochs) < self.options.epochs:
            started, before = time.perf_counter(), position.updates
            position = self._epoch(position, prediction, measured, asked)
            speed = (position.updates - before) * self.images_per_update / (time.perf_counter() - started)
            accuracy = evaluate(
                self.state.gm,
                self.val_loader.from_batch(0),
                self.data.classes,
                images=len(self.data.val),
                precision=self.precision,
                channels_last=self.options.channels_last,
                processes=self.processes,
            )
            position = position.after_epoch(accuracy, speed)
            epoch = position.epochs[-1]
            self.say(
                f"epoch {epoch.number}/{self.options.epochs}: loss {epoch.loss:.4f}, top-1 {accuracy.top1:.2%}, "
                f"balanced {accuracy.balanced:.2%}, {speed:,.1f} images/s"
            )
            self.save(position, best=position.best is epoch)
            if self.processes.any(asked.any):
                raise Stopped(f"stopped after epoch {epoch.number}; go on with the same command and --resume")
        return position

    def keep_best(self) -> None:
        """Write the best epoch's weights as a task file."""
        self.state.restore_weights(self.processes.of_first(lambda: read(self.options.folder / BEST)))
        if self.processes.parallel == "fsdp":  # all give what they have
            save_adapter(self.state.gm, self.options.folder / TASK, self.data.class_names)
        else:
            self.processes.of_first(lambda: save_adapter(self.state.gm, self.options.folder / TASK, self.data.class_names))

    def _epoch(self, position: Position, prediction: Prediction, measured: Callable[[], int | None], asked: Interrupts) -> Position:
        """The steps that are left of an epoch."""
        options, epoch = self.options, len(position.epochs)
        first = position.updates * options.grad_accumulation
        batches = training_batches(self.train_loader, epoch, first, self.mixup, options, self.processes)
        loss_sum = torch.tensor(position.loss_sum, dtype=torch.float64, device=self.processes.device)
        done = position.updates
        self.model.train()
        for norm in self.frozen_norms:
            norm.eval()

        def after_update() -> None:
            self.scheduler.step_update(epoch * self.updates_per_epoch + done + 1)
            self.processes.average(self.statistics)

        steps = training_steps(
            self.model,
            islice(batches, self.updates_per_epoch * options.grad_accumulation - first),
            self.state.optimizer,
            self.loss,
            precision=self.precision,
            accumulation=options.grad_accumulation,
            channels_last=options.channels_last,
            after_update=after_update,
        )
        each = self.images_per_update
        hidden = None if self.processes.first else True  # None: hidden where the output is no terminal
        total = self.updates_per_epoch * each
        with tqdm(total=total, initial=done * each, desc=f"epoch {epoch + 1}", unit="image", leave=False, disable=hidden) as bar:
            for loss in steps:
                done += 1
                loss_sum += loss
                if not bar.disable and done % 10 == 0:
                    memory = f"{(measured() or 0) / MB:,.0f}/{prediction.bytes / MB:,.0f} MB"
                    bar.set_postfix(loss=f"{loss.item():.3f}", memory=memory, refresh=False)
                bar.update(each)
                stop = (self.processes.count == 1 or done % _ASK_EVERY == 0) and self.processes.any(asked.any)
                if stop or (options.save_every and done % options.save_every == 0):
                    self.save(self._at(position, done, loss_sum))
                if stop:
                    raise Stopped(f"stopped in epoch {epoch + 1} after step {done}; go on with the same command and --resume")
        return self._at(position, done, loss_sum)

    def _at(self, position: Position, updates: int, loss_sum: torch.Tensor) -> Position:
        mean = (self.processes.added(loss_sum.clone()) / self.processes.count).item()
        at = replace(position, updates=updates, loss_sum=mean)
        if not math.isfinite(mean):
            raise self._diverged("the loss", at)
        return at

    def save(self, position: Position, best: bool = False) -> None:
        """Write the last checkpoint, and the best.

        Raises:
            InputError: they cannot be written, or a weight is not finite; those that were there stay.
        """
        record = self.state.record(position)
        if not all(tensor.isfinite().all() for tensor in record["trained"].values()):
            raise self._diverged("a weight", position)
        self.processes.of_first(lambda: self._write(record, best))

    def _write(self, record: dict[str, Any], best: bool) -> None:
        for name in (BEST, LAST) if best else (LAST,):  # the last one last: a run that is killed between finds both again
            write(record, self.options.folder / name)

    def _diverged(self, what: str, at: Position) -> InputError:
        rate = self.state.optimizer.param_groups[0]["lr"]
        return InputError(
            f"lr: {what} is not finite after {len(at.epochs)} epochs and {at.updates} steps, at a rate of {rate:.2g}; the "
            f"checkpoint before stays as it is; begin anew in another --output with a smaller --lr than {self.options.lr:g}."
        )


def _prepare(options: FinetuneOptions, data: DataSets, processes: Processes, say: Say) -> _Run:
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
    return _Run(
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
