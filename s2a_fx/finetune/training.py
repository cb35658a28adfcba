"""Training from a position to the last epoch: steps, evaluation, checkpoints."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from timm.data import Mixup
from torch import nn
from tqdm import tqdm

from s2a_fx.errors import InputError
from s2a_fx.finetune.checkpoint import BEST, LAST, TASK, Position, State, read, write
from s2a_fx.finetune.data import DataSets, Loader, training_batches
from s2a_fx.finetune.distributed import Processes
from s2a_fx.finetune.evaluate import evaluate
from s2a_fx.finetune.interrupts import Interrupts, Stopped
from s2a_fx.finetune.memory import Prediction
from s2a_fx.finetune.options import FinetuneOptions
from s2a_fx.finetune.steps import Precision, training_steps
from s2a_fx.report import MB
from s2a_fx.tasks.adapter import save_adapter

Say = Callable[[str], None]


@dataclass(frozen=True)
class Training:
    """All that a run works with: its epochs, its checkpoints, and its task file at the end."""

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
            made = (position.updates - before) * self.images_per_update
            speed = made / (time.perf_counter() - started) if made else None
            self.save(position)  # an evaluation may take longer than whoever ends the run waits for it
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
                f"balanced {accuracy.balanced:.2%}" + (f", {speed:,.1f} images/s" if speed else "")
            )
            self.save(position, best=position.best is epoch)
            if self.processes.any(asked.any):
                raise Stopped(f"stopped after epoch {epoch.number}; go on with the same command and --resume")
        return position

    def keep_best(self) -> None:
        """Write the best epoch's weights as a task file."""
        names = self.data.class_names
        if names is not None and len(names) != self.data.classes:  # --num-classes: some outputs have no name
            names = None
        self.state.restore_weights(self.processes.of_first(lambda: read(self.options.folder / BEST)))
        if self.processes.parallel == "fsdp":  # all give what they have
            save_adapter(self.state.gm, self.options.folder / TASK, names)
        else:
            self.processes.of_first(lambda: save_adapter(self.state.gm, self.options.folder / TASK, names))

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
                loss_sum += self._counted(loss, loss_sum / max(done, 1))
                if not bar.disable and done % 10 == 9:
                    memory = f"{(measured() or 0) / MB:,.0f}/{prediction.bytes / MB:,.0f} MB"
                    bar.set_postfix(loss=f"{loss.item():.3f}", memory=memory, refresh=False)
                done += 1
                bar.update(each)
                stop = self.processes.any(asked.any)
                if stop or (options.save_every and done % options.save_every == 0):
                    self.save(self._at(position, done, loss_sum))
                if stop:
                    raise Stopped(f"stopped in epoch {epoch + 1} after step {done}; go on with the same command and --resume")
        return self._at(position, done, loss_sum)

    def _counted(self, loss: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        """The loss of an update; the mean of those before it, if float16 overflowed and the scaler skipped the update."""
        return torch.where(loss.isfinite(), loss, mean) if self.precision.scaler.is_enabled() else loss

    def _at(self, position: Position, updates: int, loss_sum: torch.Tensor) -> Position:
        mean = (self.processes.added(loss_sum.clone()) / self.processes.count).item()
        at = replace(position, updates=updates, loss_sum=mean)
        scaler = self.precision.scaler
        if not math.isfinite(mean) or (scaler.is_enabled() and scaler.get_scale() < 1):  # halved at each of 17 updates
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
        names = (BEST, LAST) if best else (LAST,)  # the last one last: a run that is killed between finds both again
        write(record, *(self.options.folder / name for name in names))

    def _diverged(self, what: str, at: Position) -> InputError:
        rate = self.state.optimizer.param_groups[0]["lr"]
        return InputError(
            f"lr: {what} is not finite after {len(at.epochs)} epochs and {at.updates} steps, at a rate of {rate:.2g}; the "
            f"checkpoint before stays as it is; begin anew in another --output with a smaller --lr than {self.options.lr:g}."
        )
