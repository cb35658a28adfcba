"""What a fine-tuning run is asked to do."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from s2a_fx.errors import InputError
from s2a_fx.recipes import GraphPass, recipe_called, resolve, spelled

AMP = ("bfloat16", "float16")
PARALLEL = ("ddp", "fsdp")

_OF_THE_MACHINE = (
    "data", "workers", "device", "memory", "force", "output", "save_every", "resume", "pretrained", "checkpoint", "from_scratch",
    "parallel", "channels_last", "compile", "download",
)  # fmt: skip
"""What a run may be resumed with another value of; the base weights are told by their fingerprint."""

_OF_THE_MODEL = {
    "name": "model", "model_name": "model", "num_classes": "num_classes", "img_size": "image_size", "image_size": "image_size",
    "pretrained": "pretrained", "checkpoint_path": "checkpoint",
}  # fmt: skip
"""Arguments of `timm.create_model` that are options of their own, and the options."""


@dataclass(frozen=True)
class FinetuneOptions:
    """A fine-tuning run.

    Attributes:
        model: a timm model's name.
        data: the folder of the data set: `train/` and `val/` with a folder for each class, or what `dataset` wants.
        dataset: a name for timm's `create_dataset`, such as `torch/cifar10`; empty for a folder of images.
        download: let the data set fetch what it lacks.
        train_split, val_split: names of the splits.
        recipe: a recipe's name, or its passes.
        epochs, warmup_epochs: the learning rate rises over the first `warmup_epochs` (None: an eighth of all, the paper's 10 of
            80) and falls to zero along a cosine over the rest.
        batch_size: images in a step, of each process.
        image_size: side of the square images; None for the model's own.
        num_classes: of the head; None to count the data's.
        lr, weight_decay, optimizer: as in timm's `create_optimizer_v2`.
        label_smoothing: share of a target that is spread over all classes.
        augment: `none` (as the images are evaluated), `crop` (random crop and flip), or one of timm's policies, such as
            `rand-m9-mstd0.5`, on top of those.
        crop_pct: share of an image's shorter side that its centre crop shows, .05 to 1; None for the model's own.
        mixup, cutmix: alpha of the mix; 0 for none.
        amp: `bfloat16` or `float16` for automatic mixed precision.
        grad_accumulation: batches whose gradients are added up before the optimizer steps.
        channels_last, compile: memory layout of the images; `torch.compile` the model.
        seed: of everything that is drawn.
        workers: processes that load images, in each process of the run; 0 for none. `finetune` refuses more than the machine holds.
        device: None for a GPU if there is one.
        memory: bytes that the step may take; None for what is free on the device.
        force: start though it does not fit.
        output: folder for checkpoints; None for `runs/MODEL-RECIPE`.
        save_every: write the last checkpoint every so many steps, too; 0 for once an epoch.
        resume: go on from the output folder's last checkpoint.
        pretrained, checkpoint, from_scratch: exactly one of them: begin with timm's weights for the model from the hub, with those
            of a file (`.safetensors` or a state dict of `torch.save`), or with random ones.
        parallel: `ddp` or `fsdp`, in the processes that torchrun starts; None for `ddp` if there are several.
        freeze_batch_norm: the model's batch norms keep their statistics, in training as in evaluation; their biases train.
        model_options: further arguments of `timm.create_model`, as plain data, which checkpoints hold; `in_chans=1`
            reads grey images.

    Raises:
        InputError: a value that cannot be.
    """

    model: str
    data: Path
    dataset: str = ""
    download: bool = False
    train_split: str = "train"
    val_split: str = "validation"
    recipe: str | Sequence[GraphPass] = "s2a"
    epochs: int = 80
    warmup_epochs: int | None = None
    batch_size: int = 32
    image_size: int | None = None
    num_classes: int | None = None
    lr: float = 1e-3
    weight_decay: float = 1e-4
    optimizer: str = "adamw"
    label_smoothing: float = 0.1
    augment: str = "crop"
    crop_pct: float | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    amp: str | None = None
    grad_accumulation: int = 1
    channels_last: bool = False
    compile: bool = False
    seed: int = 0
    workers: int = 2
    device: str | None = None
    memory: int | None = None
    force: bool = False
    output: Path | None = None
    save_every: int = 0
    resume: bool = False
    pretrained: bool = False
    checkpoint: Path | None = None
    from_scratch: bool = False
    parallel: str | None = None
    freeze_batch_norm: bool = False
    model_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", Path(self.data))
        object.__setattr__(self, "checkpoint", Path(self.checkpoint) if self.checkpoint else None)
        for name, least in (
            ("epochs", 1),
            ("batch_size", 1),
            ("grad_accumulation", 1),
            ("workers", 0),
            ("save_every", 0),
            ("seed", 0),
        ):
            if getattr(self, name) < least:
                raise InputError(f"{name}: got {getattr(self, name)}, wanted {least} or more.")
        if self.seed >= 2**32:
            raise InputError(f"seed: got {self.seed}, wanted less than {2**32}: NumPy takes no larger one.")
        for option in fields(self):
            value = getattr(self, option.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"{option.name}: got {value}, wanted a finite number.")
        for name, value in self.model_options.items():
            if not _is_plain(value):
                raise InputError(
                    f"model_options: {name}: got {value!r}, wanted numbers, strings, None, or tuples and lists of them: "
                    "checkpoints hold it; give a name that timm knows."
                )
        for name in ("weight_decay", "mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise InputError(f"{name}: got {getattr(self, name)}, wanted 0 or more.")
        if self.lr <= 0:
            raise InputError(f"lr: got {self.lr}, wanted a number above 0.")
        if not 0 <= self.label_smoothing < 1:
            raise InputError(f"label_smoothing: got {self.label_smoothing}, wanted 0 or more, and less than 1.")
        if self.crop_pct is not None and not 0.05 <= self.crop_pct <= 1:  # images are enlarged by its inverse first
            raise InputError(f"crop_pct: got {self.crop_pct}, wanted .05 at least, and 1 at most.")
        if not 0 <= self.warmup < self.epochs:
            raise InputError(f"warmup_epochs: got {self.warmup} of {self.epochs} epochs; leave at least one to train in.")
        if self.amp not in (None, *AMP):
            raise InputError(f"amp: got {self.amp!r}, wanted one of {', '.join(AMP)}.")
        if self.parallel not in (None, *PARALLEL):
            raise InputError(f"parallel: got {self.parallel!r}, wanted one of {', '.join(PARALLEL)}.")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise InputError(f"batch_size: got {self.batch_size}, wanted an even number: mixup and cutmix mix images in pairs.")
        for name in self.model_options:
            if name in _OF_THE_MODEL:
                raise InputError(f"model_options: got {name}, which is told by {_OF_THE_MODEL[name]}; give it there.")
        if self.channels not in (None, 1, 3):
            raise InputError(f"model_options: in_chans: got {self.channels!r}, wanted 3 for colour or 1 for grey images.")
        sources = [name for name in ("pretrained", "checkpoint", "from_scratch") if getattr(self, name)]
        if len(sources) != 1:
            raise InputError(
                f"{' and '.join(sources) or 'weights'}: got {len(sources)} sources of weights, wanted exactly one: --pretrained "
                "(timm's, from the hub), --checkpoint FILE, or --from-scratch (random)."
            )

    @property
    def warmup(self) -> int:
        """Epochs of rising learning rate."""
        return self.epochs // 8 if self.warmup_epochs is None else self.warmup_epochs

    @property
    def channels(self) -> Any:
        """Channels of the images; None for the model's own."""
        return self.model_options.get("in_chans")

    @property
    def folder(self) -> Path:
        """Where checkpoints are written."""
        recipe = self.recipe if isinstance(self.recipe, str) else "+".join(p.partition("(")[0] for p in spelled(self.recipe))
        return Path("runs", f"{self.model}-{recipe or 'full'}") if self.output is None else Path(self.output)

    def of_the_result(self) -> dict[str, Any]:
        """The options that decide the final weights, as plain data: a run is resumed with the same."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _OF_THE_MACHINE}
        return {**found, "warmup_epochs": self.warmup, "recipe": recipe_called(spelled(resolve(self.recipe)))}


def _is_plain(value: Any) -> bool:
    """Whether a checkpoint can hold the value, and read it without running code."""
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)
