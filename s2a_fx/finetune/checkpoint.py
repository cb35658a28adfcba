"""Checkpoints: what a run needs to go on as if it had never stopped.

A checkpoint holds what changes: the weights that train, buffers, the optimizer's state, and where the run stands. The frozen
weights come again from where they came, and a fingerprint tells whether they are the same: a checkpoint of a ViT-B is 10 MB
instead of 350, and can be written every few steps. Generators have no state to be stored: see `draws.py`.

Files are written whole or not at all, and read as tensors, numbers and strings: no code that a file may hold is run. A digest of
all that a file says tells a damaged one from a whole one; it is no signature.
"""

import hashlib
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from s2a_fx.errors import InputError
from s2a_fx.finetune.distributed import spread
from s2a_fx.finetune.evaluate import Accuracy
from s2a_fx.sharded import laid_out_like, whole
from s2a_fx.tasks.base_digests import persistent
from s2a_fx.tasks.task_file import bytes_of
from s2a_fx.whole_file import written_whole

LAST, BEST, TASK = "last.pt", "best.pt", "task.safetensors"
VERSION = 1


@dataclass(frozen=True)
class Epoch:
    """A finished epoch: its number from 1, mean training loss, accuracy on the evaluation split, and images trained on a second.

    There is no such speed, but None, of an epoch whose steps another process made: the run was killed in the evaluation.
    """

    number: int
    loss: float
    accuracy: Accuracy
    images_per_second: float | None


@dataclass(frozen=True)
class Position:
    """Where a run stands: finished epochs, and in the present one the updates done and the sum of their losses."""

    epochs: tuple[Epoch, ...] = ()
    updates: int = 0
    loss_sum: float = 0.0

    def after_epoch(self, accuracy: Accuracy, images_per_second: float | None) -> "Position":
        """The epoch is over."""
        epoch = Epoch(len(self.epochs) + 1, self.loss_sum / self.updates, accuracy, images_per_second)
        return Position((*self.epochs, epoch))

    @property
    def best(self) -> Epoch:
        """The epoch of the highest accuracy, the first of several; one at least is over."""
        return max(self.epochs, key=lambda e: e.accuracy.top1)


@dataclass(frozen=True)
class State:
    """What a checkpoint is taken of and read into."""

    gm: fx.GraphModule
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    options: dict[str, Any]
    fingerprint: str

    def record(self, position: Position) -> dict[str, Any]:
        """All that is stored; all processes make it together."""
        spread(self.gm)
        with torch.no_grad():
            trained = {n: whole(p.detach()).cpu() for n, p in self.gm.named_parameters() if p.requires_grad}
            optimizer = self.optimizer.state_dict()
            optimizer["state"] = {i: {k: whole(v) for k, v in values.items()} for i, values in optimizer["state"].items()}
        return {
            "trained": trained,
            "buffers": self._buffers(),
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "position": asdict(position),
            "options": self.options,
            "fingerprint": self.fingerprint,
        }

    def restore(self, record: dict[str, Any]) -> Position:
        """Take over a record of this run's."""
        self.restore_weights(record)
        self.optimizer.load_state_dict(record["optimizer"])
        for parameter, values in self.optimizer.state.items():
            alike = {k: v for k, v in values.items() if isinstance(v, torch.Tensor) and v.shape == parameter.shape}
            values.update({k: laid_out_like(parameter, v) for k, v in alike.items()})
        self.scaler.load_state_dict(record["scaler"])
        stored = record["position"]
        epochs = tuple(Epoch(**{**e, "accuracy": Accuracy(**e["accuracy"])}) for e in stored["epochs"])
        return Position(epochs, stored["updates"], stored["loss_sum"])

    def restore_weights(self, record: dict[str, Any]) -> None:
        """Take over a record's weights and buffers."""
        spread(self.gm)
        buffers = self._buffers()
        with torch.no_grad():
            for name, parameter in self.gm.named_parameters():
                if name in record["trained"]:
                    parameter.copy_(laid_out_like(parameter, record["trained"][name]))
            for name, value in record["buffers"].items():
                buffers[name].copy_(value)

    def _buffers(self) -> dict[str, torch.Tensor]:
        return {name: t for name, t in persistent(self.gm).items() if not isinstance(t, nn.Parameter)}

    def check(self, record: dict[str, Any], file: Path) -> None:
        """Raise `InputError` if the record is of another run, before anything of it is copied."""
        for name, value in self.options.items():
            stored = record["options"].get(name)
            if stored != value:
                if isinstance(stored, list) and isinstance(value, list):  # of a thousand classes, the first that is another
                    stored, value = next(pair for pair in zip_longest(stored, value) if pair[0] != pair[1])
                raise InputError(
                    f"{file}: its run had {name} {stored!r}, got {value!r}; resume with the same, or begin a run in another "
                    "--output."
                )
        if record["fingerprint"] != self.fingerprint:
            raise InputError(f"{file}: its run began with other weights; give the same --pretrained or --checkpoint.")
        tensors = {n: t for n, t in persistent(self.gm).items() if t.requires_grad or not isinstance(t, nn.Parameter)}
        found = {**record["trained"], **record["buffers"]}
        if strange := [name for name in {**tensors, **found} if not _alike(tensors.get(name), found.get(name))]:
            raise InputError(
                f"{file}: its tensors are not those of this model: {', '.join(strange[:3])}{', ...' if strange[3:] else ''}; "
                "resume with the versions of timm and s2a_fx that the run began with."
            )
        stored, wanted = record["optimizer"]["param_groups"], self.optimizer.state_dict()["param_groups"]
        if [group["params"] for group in stored] != [group["params"] for group in wanted]:
            raise InputError(f"{file}: its optimizer has other groups of parameters; resume with the timm that the run began with.")


def _alike(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and one.shape == other.shape and one.dtype == other.dtype


def write(record: dict[str, Any], *files: Path) -> None:
    """Write a checkpoint to each of the files in turn, whole or not at all.

    Raises:
        InputError: a file cannot be written.
    """
    content = {"version": VERSION, "digest": _digest(record), "run": record}
    for file in files:
        try:
            with written_whole(file, _part) as stream:
                torch.save(content, stream)
        except (OSError, RuntimeError) as error:  # of a full disk torch makes an error of its own
            reason = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
            raise InputError(f"{file}: cannot be written: {reason}.") from error


def _part(target: Path) -> Path:
    """Of one name: what a killed run leaves is written over."""
    return target.with_name(f".{target.name}.part")


def require(file: Path) -> None:
    """Raise `InputError` if there is no such file."""
    if not file.is_file():
        raise InputError(
            f"{file}: there is no checkpoint to resume from; give the run's --output, or begin in another without --resume."
        )


def read(file: Path) -> dict[str, Any]:
    """Read a checkpoint, also while the run that writes it goes on.

    Raises:
        InputError: there is none, it is no checkpoint of a run, of another version, or damaged.
    """
    before = _written(file)
    try:
        return _read(file)
    except InputError:
        if _written(file) == before:
            raise
    return read(file)  # torch opens a file twice, for its list of tensors and for their values: one was of the old file


def _written(file: Path) -> tuple[int, int]:
    """Another pair for another file of that name: a number may come again, with another time."""
    require(file)
    found = file.stat()
    return found.st_ino, found.st_mtime_ns


def _read(file: Path) -> dict[str, Any]:
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True, mmap=True)  # no second copy of what is trained
        version, record = stored["version"], stored["run"]
        intact = version != VERSION or stored["digest"] == _digest(record)
    except Exception as error:  # a damaged archive has errors of many kinds
        raise _damaged(file) from error
    if version != VERSION:
        raise InputError(f"{file}: is of version {version!r}, this s2a_fx reads {VERSION}; resume with the one that wrote it.")
    if not intact:
        raise _damaged(file)
    return record  # type: ignore[no-any-return]


def _damaged(file: Path) -> InputError:
    return InputError(f"{file}: is no checkpoint of s2a-fx finetune, or a damaged one; begin anew in another --output.")


def _digest(record: Any) -> str:
    """One sha256 for all values of a record, however they are nested."""
    digest = hashlib.sha256()
    if isinstance(record, dict):
        parts = [*map(repr, record), *map(_digest, record.values())]
    elif isinstance(record, list | tuple):
        parts = [_digest(value) for value in record]
    elif isinstance(record, torch.Tensor):
        parts = [str(record.dtype), str(record.shape)]
        digest.update(bytes_of(record))
    else:
        parts = [repr(record)]
    digest.update("\n".join(parts).encode())
    return digest.hexdigest()
