"""Random numbers that depend on their place alone.

Every image and every batch draws from generators that are seeded for it: from the run's seed, the epoch, and its index. A run
therefore goes on from any step as if it had never stopped, with any number of workers, and no generator's state is stored.
"""

from typing import Any

import numpy as np
from timm.data import ImageDataset
from timm.utils import random_seed
from torch.utils.data import Dataset
from torchvision.datasets import DatasetFolder

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
            return self._image(index)
        except OSError as error:
            name = self._name(index)
            told = error if name is None else error.strerror or error  # as text, the error of a missing file repeats its name
            where = name or f"image {index} of the data set"
            raise UnreadableImage(f"{where}: cannot be read ({told}); mend it or take it out.") from error

    def _image(self, index: int) -> Any:
        """The image and its class.

        Of timm's data sets the file is read here, and decoded by the transform: timm's own reading and decoding put the next image
        in the place of one that is missing or broken.
        """
        if not isinstance(self.dataset, ImageDataset):
            return self.dataset[index]
        file, target, *_ = self.dataset.reader[index]
        with file:
            content = file.read()
        image = content if self.transform is None else self.transform(content)
        return image, -1 if target is None else target

    def _name(self, index: int) -> str | None:
        """The file of an image; None if the data set does not tell it."""
        if isinstance(self.dataset, DatasetFolder):
            return self.dataset.samples[index][0]
        named = getattr(self.dataset, "filename", None)
        return named and named(index, absolute=True)  # type: ignore[no-any-return]

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def transform(self) -> Any:
        """Set by timm's loader factory."""
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform
