"""Data sets and loaders, by timm's factories."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from timm.data import Mixup, create_dataset, create_loader
from torch.utils.data import IterableDataset
from torch.utils.data.distributed import DistributedSampler
from torchvision.transforms import Compose

from s2a_fx.errors import InputError
from s2a_fx.finetune.distributed import Processes
from s2a_fx.finetune.draws import Drawn, draw_for_batch
from s2a_fx.finetune.image_files import check_plain, image_files
from s2a_fx.finetune.interrupts import stand_apart
from s2a_fx.finetune.options import FinetuneOptions


@dataclass(frozen=True)
class DataSets:
    """What is trained on, what is evaluated on, how many classes both have, and their names in order, None if no one tells them."""

    train: Any
    val: Any
    classes: int
    class_names: tuple[str, ...] | None = None


def open_data(options: FinetuneOptions, processes: Processes) -> DataSets:
    """The two splits of the run's data set.

    Raises:
        InputError: there is no such data, a split is missing or empty, an image of a folder is no plain file or lies in no class's
            own folder, or the classes of the splits do not agree.
    """
    if not options.dataset and not options.data.is_dir():
        raise InputError(f"{options.data}: there is no such folder; give one that holds train/ and val/, or name a --dataset.")
    if options.download:
        processes.once_a_machine(lambda: _fetch(options))
    train = _split(options, options.train_split)
    val = _split(options, options.val_split)
    names, val_names = _class_names(train), _class_names(val)
    if names and val_names and names != val_names:
        _check_names(options, names, val_names, movable=_classes_by_name(val) is not None)
        places = {name: place for place, name in enumerate(names)}
        val = _split(options, options.val_split, class_map=places)  # a class without images must not shift the others
    counted = options.num_classes if names is None else len(names)
    if counted is None:
        raise InputError(f"{options.dataset}: does not say how many classes it has; give --num-classes.")
    classes = options.num_classes or counted
    if classes < counted or counted < 2:
        wanted = "two at least" if counted < 2 else f"no more than the {classes} of --num-classes"
        raise InputError(f"{options.data}: got {counted} {'class' if counted == 1 else 'classes'}, wanted {wanted}.")
    return DataSets(Drawn(train, options.seed), Drawn(val, options.seed), classes, names)


def _fetch(options: FinetuneOptions) -> None:
    """Open both splits for what that downloads."""
    for split in (options.train_split, options.val_split):
        _split(options, split)


def _split(options: FinetuneOptions, split: str, **settings: Any) -> Any:
    try:
        dataset = create_dataset(options.dataset, root=str(options.data), split=split, download=options.download, **settings)
    except Exception as error:  # each kind of data set has its own
        fetch = "; --download fetches what can be had" if options.dataset and not options.download else ""
        raise InputError(f"{options.dataset or options.data}, split {split!r}: cannot be opened: {error}{fetch}.") from error
    if isinstance(dataset, IterableDataset):
        raise InputError(f"{options.dataset}: is a stream; wanted a data set of known order: a folder, torch/... or hfds/...")
    if not options.dataset and dataset.reader.root == str(options.data):
        raise InputError(
            f"{options.data}: has no folder for the split {split!r}; wanted train/ and val/, a folder a class in each."
        )
    files = image_files(dataset)
    check_plain(files)
    if not options.dataset:
        _check_places(Path(dataset.reader.root), files)
    if not len(dataset):
        raise InputError(f"{options.dataset or options.data}, split {split!r}: has no images.")
    return dataset


def _check_places(root: Path, files: list[str]) -> None:
    """Refuse images that lie elsewhere than in a folder of their class: timm names a class by the last folder alone."""
    strange = next((file for file in files if Path(file).parent.parent != root), None)
    if strange is not None:
        raise InputError(f"{strange}: lies in no folder of a class; wanted {root}/CLASS/IMAGE. Move it, or take another --dataset.")


def _check_names(options: FinetuneOptions, names: tuple[str, ...], val_names: tuple[str, ...], movable: bool) -> None:
    """Refuse classes of one split that cannot be made those of the other; `movable`: the data set takes other indices."""
    if strange := sorted(set(val_names) - set(names)):
        raise InputError(
            f"{options.data}: {', '.join(strange[:3])}: in the split {options.val_split!r} and not in {options.train_split!r}; "
            "give both splits the same classes."
        )
    if not movable:
        raise InputError(
            f"{options.data}: the split {options.val_split!r} has {len(val_names)} classes of the {len(names)} of "
            f"{options.train_split!r}, or in another order, and {options.dataset} takes no order; give both the same classes."
        )


def _class_names(dataset: Any) -> tuple[str, ...] | None:
    """The classes in the order of their indices; None if the data set does not tell them."""
    features = getattr(getattr(getattr(dataset, "reader", None), "dataset", None), "features", {})
    labels = getattr(features.get("label"), "names", None)
    by_name = _classes_by_name(dataset) or {}
    found = sorted(by_name, key=by_name.__getitem__) or getattr(dataset, "classes", None) or labels
    return tuple(", ".join(n) if isinstance(n, tuple) else str(n) for n in found) if found else None


def _classes_by_name(dataset: Any) -> dict[str, int] | None:
    """The indices that timm's reader gives to the classes; None for other data sets, which take none."""
    return getattr(getattr(dataset, "reader", None), "class_to_idx", None) or None


class Order(DistributedSampler[int]):
    """The order of an epoch for one process of several, or one; it begins at `start`."""

    start = 0

    def __iter__(self) -> Iterator[int]:
        return islice(super().__iter__(), self.start, None)


@dataclass(frozen=True)
class Loader:
    """Batches of a split on the device, normalized; `order` and `dataset` are told the epoch before each pass."""

    batches: Any
    order: Order
    dataset: Drawn

    def __len__(self) -> int:
        return len(self.batches)

    def from_batch(self, epoch: int, first: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches of an epoch, without loading those before the `first`."""
        self.order.set_epoch(epoch)
        self.order.start = first * self.batches.loader.batch_size
        self.dataset.epoch = epoch
        return iter(self.batches)


def make_loader(
    dataset: Drawn, config: dict[str, Any], options: FinetuneOptions, processes: Processes, device: torch.device, train: bool
) -> Loader:
    """timm's loader for a split.

    Args:
        config: the model's data settings, as timm resolves them.
        train: augmented and shuffled, whole batches only.

    Raises:
        InputError: timm knows no such augmentation.
    """
    try:
        batches: Any = create_loader(
            dataset,  # type: ignore[arg-type]
            input_size=config["input_size"],
            batch_size=options.batch_size,
            is_training=train and options.augment != "none",  # timm's no_aug would show other images than are evaluated
            auto_augment=None if options.augment in ("none", "crop") else options.augment,
            color_jitter=0.0,
            interpolation=config["interpolation"],
            mean=config["mean"],
            std=config["std"],
            crop_pct=config["crop_pct"],
            crop_mode=config["crop_mode"],
            num_workers=options.workers,
            persistent_workers=False,  # an epoch's workers are told the epoch when they start
            pin_memory=device.type == "cuda",
            device=device,
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise InputError(f"augment: timm refuses {options.augment!r}: {error}; give none, crop, or a policy of timm's.") from error
    mode = "L" if config["input_size"][0] == 1 else "RGB"
    dataset.transform = Compose([partial(_decoded, mode=mode), dataset.transform])
    batches.loader.worker_init_fn = stand_apart  # timm's only seeds, and each image has draws of its own
    order = Order(dataset, processes.count, processes.rank, shuffle=train, seed=options.seed, drop_last=train)
    batches.loader.batch_sampler.drop_last = train
    batches.loader.batch_sampler.sampler = order  # one order for one process and for many, which can begin anywhere
    return Loader(batches, order, dataset)


def _decoded(image: Image.Image | bytes, mode: str) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert(mode)
    try:
        return Image.open(BytesIO(image)).convert(mode)
    except UnidentifiedImageError as error:
        raise OSError("no image that Pillow knows") from error
    except (SyntaxError, ValueError, Image.DecompressionBombError) as error:  # as Pillow has it for some damaged files
        raise OSError(str(error)) from error


def make_mixup(options: FinetuneOptions, classes: int) -> Mixup | None:
    """timm's mixup and cutmix; None if neither is asked for."""
    if not options.mixup and not options.cutmix:
        return None
    return Mixup(options.mixup, options.cutmix, label_smoothing=options.label_smoothing, num_classes=classes)


def training_batches(
    loader: Loader, epoch: int, first: int, mixup: Mixup | None, options: FinetuneOptions, processes: Processes
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The batches of an epoch from the `first` on, mixed; what the model draws for each depends on its place alone."""
    for index, (images, targets) in enumerate(loader.from_batch(epoch, first), first):
        draw_for_batch(options.seed, epoch, index, processes.rank)
        yield (images, targets) if mixup is None else mixup(images, targets)
