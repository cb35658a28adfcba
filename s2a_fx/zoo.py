"""timm models by name, built on the meta device: no weights are allocated, none are downloaded."""

from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import timm
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from s2a_fx.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class _SchedulesOnCPU(TorchFunctionMode):
    """Older timm constructors read numbers off a `torch.linspace`, which a meta tensor has none of."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.linspace:
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


@contextmanager
def on_meta() -> Iterator[None]:
    """Modules constructed inside have their weights on the meta device."""
    with torch.device("meta"), _SchedulesOnCPU():
        yield


def timm_model(
    name: str,
    *,
    num_classes: int | None = None,
    image_size: int | None = None,
    batch_size: int = 32,
    dtype: str = "float32",
) -> tuple[nn.Module, torch.Tensor]:
    """A timm model and an example input for it, both on the meta device.

    Args:
        name: as in `timm.list_models()`.
        num_classes: of the head; left out, the model's own.
        image_size: side of the square input; left out, the model's own.
        batch_size: images in the example input.
        dtype: of weights and input: `float32`, `bfloat16` or `float16`.

    Raises:
        InputError: timm has no such model, or cannot build it for this image size.
    """
    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() names them all."
        raise InputError(f"unknown model {name!r}; {hint}")
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    with on_meta():
        model = timm.create_model(name, pretrained=False, **options)
        config: Any = model.pretrained_cfg
        if image_size is not None and config.get("fixed_input_size"):
            try:
                model = timm.create_model(name, pretrained=False, img_size=image_size, **options)
            except (AssertionError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
                raise InputError(f"{name} cannot be built for {image_size} x {image_size} images: {error}.") from error
    channels, height, width = config["input_size"]
    if image_size is not None:
        height = width = image_size
    example = torch.empty(batch_size, channels, height, width, device="meta", dtype=DTYPES[dtype])
    return model.to(DTYPES[dtype]).train(), example
