"""A data set that a small model learns in seconds: noisy squares of three colours, and a run on it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from s2a_fx.finetune import FinetuneOptions
from s2a_fx.finetune.checkpoint import read

COLOURS = {"red": (200, 60, 60), "green": (60, 200, 60), "blue": (60, 60, 200)}
SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3}


def write_colours(folder: Path, train: int = 16, val: int = 6) -> Path:
    """Write so many images of each colour into train/ and val/."""
    draws = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for name, colour in COLOURS.items():
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(draws.normal(colour, 60, (40, 40, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


def small_run(data: Path, output: Path, **changes: Any) -> FinetuneOptions:
    """A run of two epochs of six steps on the CPU, with draws in the model, too."""
    options = FinetuneOptions(
        model="vit_tiny_patch16_224",
        data=data,
        epochs=2,
        batch_size=8,
        image_size=32,
        lr=3e-3,
        workers=0,
        from_scratch=True,
        device="cpu",
        output=output,
        model_options={**SMALL, "drop_path_rate": 0.1, "proj_drop_rate": 0.1},
    )
    return replace(options, **{"from_scratch": "checkpoint" not in changes, **changes})


def stored(output: Path, name: str = "last.pt") -> dict[str, Any]:
    """A run's checkpoint, speeds left out."""
    record = read(output / name)
    for epoch in record["position"]["epochs"]:
        del epoch["images_per_second"]
    return record


def assert_same(one: Any, other: Any) -> None:
    """Alike to the last bit, all through."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other
