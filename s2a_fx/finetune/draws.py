"""Random numbers that depend on their place alone.

Every image and every batch draws from generators that are seeded for it: from the run's seed, the epoch, and its index. A run
therefore goes on from any step as if it had never stopped, with any number of workers, and no generator's state is stored.
"""

from typing import Any

import numpy as np
from PIL import Image
from timm.data import ImageDataset
from timm.utils import random_seed
from torch.utils.data import Dataset

from s2a_fx.errors import UnreadableImage

_IMAGE, _BATCH = 0, 1


def draw_for_image(seed: int, epoch: int, index: int) -> None:
    """From here on, draw what the augmentation of image `index` draws in this epoch."""
    _seed(_IMAGE, seed, epoch, index)


def draw_for_batch(seed: int, epoch: int, index: int, rank: int = 0) -> None:
    """From here on, draw what mixup, dropout and the like draw for batch `index` of this epoch in process `rank`."""
    _seed(_BATCH, seed, epoch, index, rank)


def _seed(*place: int) -> None:
    random_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))


class Drawn(Dataset[Any]):
    """A data set, each image augmented by draws of its own; `epoch` is set before each epoch.

    Raises:
        UnreadableImage: an image cannot be read. None is left out, and none stands for another.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed, self.epoch = dataset, seed, 0

    def __getitem__(self, index: int) -> Any:
        draw_for_image(self.seed, self.epoch, index)
        try:
            return _read(self.dataset, index)
        except OSError as error:
            named = getattr(self.dataset, "filename", None)
            name = named(index, absolute=True) if named else f"image {index} of the data set"
            raise UnreadableImage(f"{name}: cannot be read ({error}); mend it or take it out.") from error

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def transform(self) -> Any:
        """Set by timm's loader factory."""
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform


def _read(dataset: Any, index: int) -> Any:
    """An image and its class; timm's own data set would put the next image in the place of one that cannot be read."""
    if not isinstance(dataset, ImageDataset):
        return dataset[index]
    stream, target, *_ = dataset.reader[index]
    image = stream.read() if dataset.load_bytes else Image.open(stream)
    if dataset.input_img_mode and not dataset.load_bytes:
        image = image.convert(dataset.input_img_mode)
    if target is not None and dataset.target_transform is not None:
        target = dataset.target_transform(target)
    return image if dataset.transform is None else dataset.transform(image), -1 if target is None else target
