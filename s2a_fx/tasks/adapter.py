"""Task files: what a recipe trained, apart from the base that it was trained on.

s2a_fx.save_adapter(gm, "flowers.safetensors")        a few MB: what trains, and the statistics of batch norms
s2a_fx.load_adapter(gm, "flowers.safetensors")        into the same base (timm's name and every frozen weight), same recipe

tasks = {name: s2a_fx.read_adapter(f"{name}.safetensors") for name in names}
tasks["birds"].apply(gm)                              one base, many tasks: the base is checked once, then values are copied

A task fits a model whose own task has the same names, so that no frozen weight is ever overwritten. A model's task are its running
statistics and the parameters that need a gradient or, of a model that is frozen as a whole for inference, those that `transform`
left trainable.
"""

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from torch import fx, nn

from s2a_fx.errors import AdapterError, InputError
from s2a_fx.graph.metadata import Origin
from s2a_fx.recipes import recipe_called
from s2a_fx.sharded import is_spread, laid_out_like, whole
from s2a_fx.tasks import task_file
from s2a_fx.tasks.base_digests import digests, fingerprint, persistent, require_values
from s2a_fx.tasks.origin import origin_of

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""Buffers that training changes, by the names that torch and timm give them."""


@dataclass(frozen=True, eq=False)
class TaskAdapter:
    """What one task trained. `of` takes it from a model, `apply` puts it into one; it shares no memory with either.

    Attributes:
        model: name of the base, for messages.
        passes: the recipe, each pass with all its options.
        base: digest of each tensor that is the base's alone.
        tensors: the trained parameters and the statistics, on the CPU.
        classes: the name of each class, in the order of the head's outputs; None where they were not told.
    """

    model: str
    passes: tuple[str, ...]
    base: Mapping[str, str] = field(repr=False)
    tensors: Mapping[str, torch.Tensor] = field(repr=False)
    classes: tuple[str, ...] | None = None

    @staticmethod
    def of(gm: nn.Module, classes: Sequence[str] | None = None) -> "TaskAdapter":
        """What `gm`, made by `transform`, has trained: parameters that need a gradient, and all running statistics.

        Of parameters that are spread over processes (FSDP2) the whole is gathered: every process must call this.

        Args:
            classes: the name of each class, in the order of the head's outputs; readers get them back, and nothing else is done
                with them.

        Raises:
            InputError: `gm` was not made by `transform`, or `classes` are no names.
            AdapterError: it has no values (meta device), or nothing that trains.
        """
        origin = _origin(gm)
        if classes is not None and not _are_names(classes):
            raise InputError(f"classes: got {classes!r}, wanted the name of each class, in the order of the head's outputs.")
        held = persistent(gm)
        needed = _needing_gradient(held)
        if not needed:
            raise AdapterError("no parameter of the model needs a gradient: there is no task to keep. Save before you freeze all.")
        trained = _task(held, needed)
        for name, tensor in trained.items():
            require_values(name, tensor)
        tensors = {
            name: whole(tensor).detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, tensor in trained.items()
        }
        base = digests({n: t for n, t in held.items() if n not in trained})
        return TaskAdapter(origin.model, origin.passes, base, tensors, None if classes is None else tuple(classes))

    def apply(self, gm: nn.Module) -> None:
        """Copy the task's values into `gm`: in train or eval mode, on any device, spread over processes or not.

        All is checked before anything is copied, and taken back if a copy fails. The base is read once for a model; later calls
        copy values only, and do not see what was written to the base past autograd, by `p.data.mul_(2)`, in between. Nothing but
        values changes: not the mode, nor what needs a gradient, nor an optimizer's state.

        Raises:
            InputError: `gm` was not made by `transform`.
            AdapterError: recipe, names, shapes, dtypes or frozen weights differ from those that the task was trained with; `gm` is
                as it was.
        """
        origin, held = _origin(gm), persistent(gm)
        self._check_model(origin)
        self._check_recipe(origin)
        self._check_names(origin, held)
        for name, tensor in self.tensors.items():
            self._check_tensor(gm, name, tensor, held[name])
        self._check_base(origin, {n: t for n, t in held.items() if n not in self.tensors})
        with torch.no_grad():
            values = [(held[name], laid_out_like(held[name], tensor)) for name, tensor in self.tensors.items()]
            before = [target.clone() for target, _ in values]
            try:
                for target, value in values:
                    target.copy_(value)
            except RuntimeError as error:
                for (target, _), value in zip(values, before, strict=True):
                    with contextlib.suppress(RuntimeError):  # what could not be written is as it was
                        target.copy_(value)
                first = str(error).splitlines()[0]
                raise AdapterError(f"the model's tensors cannot be written ({first}); it is as it was. Build it anew.") from error

    def _check_model(self, origin: Origin) -> None:
        if self.model != origin.model and timm.is_model(self.model) and timm.is_model(origin.model):
            raise AdapterError(
                f"the task was trained on {self.model}, the model is a {origin.model}; load it into one that it was trained on."
            )

    def _check_recipe(self, origin: Origin) -> None:
        if self.passes != origin.passes:
            wanted, got = recipe_called(self.passes), recipe_called(origin.passes)
            raise AdapterError(
                f"the task was trained under the recipe {wanted}, the model was made by {got}; "
                f"transform the base with the recipe {wanted}."
            )

    def _check_names(self, origin: Origin, held: Mapping[str, torch.Tensor]) -> None:
        wanted = _task(held, _needing_gradient(held) or set(origin.trained))
        unexpected = [name for name in self.tensors if name not in wanted]
        missing = [name for name in wanted if name not in self.tensors]
        if unexpected or missing:
            raise AdapterError(
                f"the task, trained on {self.model}, has {_some(unexpected)} that the model has not or keeps frozen, and lacks "
                f"{_some(missing)} that the model trains; load it into the model that it was trained on, with the same parameters "
                "frozen; freeze all of them, if you like, after it is loaded."
            )

    def _check_tensor(self, gm: nn.Module, name: str, got: torch.Tensor, wanted: torch.Tensor) -> None:
        require_values(name, wanted)
        if got.shape != wanted.shape:
            layer = gm.get_submodule(name.rpartition(".")[0])
            classes = isinstance(layer, nn.Linear | nn.Conv2d) and got.ndim and got.shape[1:] == wanted.shape[1:]
            remedy = f"num_classes={got.shape[0]}, if this is the head" if classes else f"inputs of the size of {self.model}'s"
            raise AdapterError(
                f"{name}: the task has shape {list(got.shape)}, the model {list(wanted.shape)}; build and transform the model "
                f"with {remedy}."
            )
        if got.dtype != wanted.dtype:
            raise AdapterError(
                f"{name}: the task has {got.dtype}, the model {wanted.dtype}; load the task first, then convert the model."
            )

    def _check_base(self, origin: Origin, frozen: Mapping[str, torch.Tensor]) -> None:
        present = digests(frozen)
        differing = [name for name in {**self.base, **present} if self.base.get(name) != present.get(name)]
        if differing:
            raise AdapterError(
                f"the task was trained on {self.model} with other frozen weights than this {origin.model} has "
                f"(fingerprint {fingerprint(self.base)[:12]}, got {fingerprint(present)[:12]}): {_some(differing)} differ. "
                "Load the pretrained weights that it was trained on, in the same dtype."
            )


def save_adapter(gm: nn.Module, path: str | os.PathLike[str], classes: Sequence[str] | None = None) -> None:
    """Write what `gm`, made by `transform`, has trained to a safetensors file, whole or not at all.

    A symbolic link is followed and stays; a pipe or a device is written into.

    Of a model that is spread over processes (FSDP2) every process must call this, and the first one writes. Replicas (DDP) write
    the same file each: let one of them do it, and give it `ddp.module`.

    Args:
        classes: the name of each class, in the order of the head's outputs, for those who read the file.

    Raises:
        InputError: `gm` was not made by `transform`, or `classes` are no names.
        AdapterError: nothing trains, or the file cannot be written.
    """
    adapter = TaskAdapter.of(gm, classes)
    if not is_spread(gm):
        _write(adapter, Path(path))
        return
    told: list[str | None] = ["the first process failed"]
    try:
        if dist.get_rank() == 0:
            _write(adapter, Path(path))
            told = [None]
    except AdapterError as error:
        told = [str(error)]
        raise
    finally:  # the others wait for it, whatever went wrong: they may read the file next
        dist.broadcast_object_list(told, src=0)
    if told[0] is not None:
        raise AdapterError(told[0])


def load_adapter(gm: nn.Module, path: str | os.PathLike[str]) -> None:
    """Read a task file and copy its values into `gm`: `read_adapter(path).apply(gm)`.

    Raises:
        InputError: `gm` was not made by `transform`.
        AdapterError: the file is no whole task file, or does not fit `gm`, which is then as it was.
    """
    _origin(gm)
    adapter = read_adapter(path)
    try:
        adapter.apply(gm)
    except AdapterError as error:
        raise AdapterError(f"{os.fspath(path)}: {error}") from error


def read_adapter(path: str | os.PathLike[str]) -> TaskAdapter:
    """The task in a file that `save_adapter` wrote. Nothing in it is executed.

    Raises:
        AdapterError: there is no such file, it is damaged or cut off, or it is no task file.
    """
    metadata, tensors = task_file.read(Path(path))
    try:
        passes, base, classes = (json.loads(metadata[key]) for key in ("passes", "base", "classes"))
        whole_file = _are_strings(passes) and _are_strings(list(base.values())) and fingerprint(base) == metadata["fingerprint"]
        whole_file = whole_file and (classes is None or _are_strings(classes))
        adapter = TaskAdapter(metadata["model"], tuple(passes), base, tensors, None if classes is None else tuple(classes))
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        whole_file = False
    if not whole_file:
        raise AdapterError(f"{os.fspath(path)}: its metadata are not those that save_adapter writes; save the task again.")
    return adapter


def _write(adapter: TaskAdapter, path: Path) -> None:
    metadata = {
        "model": adapter.model,
        "recipe": recipe_called(adapter.passes),
        "passes": json.dumps(adapter.passes),
        "fingerprint": fingerprint(adapter.base),
        "base": json.dumps(adapter.base),
        "classes": json.dumps(adapter.classes),
    }
    task_file.write(path, metadata, adapter.tensors)


def _are_strings(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _are_names(classes: Any) -> bool:
    return isinstance(classes, Sequence) and not isinstance(classes, str) and _are_strings(list(classes))


def _origin(gm: nn.Module) -> Origin:
    origin = origin_of(gm)
    if origin is None or not isinstance(gm, fx.GraphModule):
        raise InputError(
            f"got a {type(gm).__name__}, wanted what s2a_fx.transform(model, inputs, recipe) returns; "
            "if it is wrapped (DDP, torch.compile), give what is inside (.module, ._orig_mod)."
        )
    return origin


def _needing_gradient(held: Mapping[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in held.items() if isinstance(tensor, nn.Parameter) and tensor.requires_grad}


def _task(held: Mapping[str, torch.Tensor], trained: set[str]) -> dict[str, torch.Tensor]:
    """The parameters that train, and all running statistics."""

    def belongs(name: str, tensor: torch.Tensor) -> bool:
        return name in trained if isinstance(tensor, nn.Parameter) else name.rpartition(".")[2] in _STATISTICS

    return {name: tensor for name, tensor in held.items() if belongs(name, tensor)}


def _some(names: list[str]) -> str:
    """The first few of the names, and how many more there are."""
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown or "nothing"
