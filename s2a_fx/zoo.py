"""timm models by name: for reports on the meta device, where no weights are allocated and none are downloaded."""

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
    with on_meta():
        model = create_model(name, num_classes=num_classes, image_size=image_size)
    config: Any = model.pretrained_cfg
    channels, height, width = config["input_size"]
    if image_size is not None:
        height = width = image_size
    example = torch.empty(batch_size, channels, height, width, device="meta", dtype=DTYPES[dtype])
    return model.to(DTYPES[dtype]).train(), example


def create_model(
    name: str, *, num_classes: int | None = None, image_size: int | None = None, pretrained: bool = False, **options: Any
) -> nn.Module:
    """A timm model by name; arguments as in `timm_model`, `pretrained` and `options` as in `timm.create_model`.

    Raises:
        InputError: timm has no such model, or cannot build it so.
    """
    if "/" in name or ":" in name:
        raise InputError(f"unknown model {name!r}; wanted a name of timm's own, without hub or owner: {name.rpartition('/')[2]!r}.")
    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() names them all."
        raise InputError(f"unknown model {name!r}; {hint}")
    asked = f" for {image_size} x {image_size} images" if image_size is not None else ""
    asked += f" with {', '.join(f'{key}={value!r}' for key, value in options.items())}" if options else ""
    if num_classes is not None:
        options["num_classes"] = num_classes
    try:
        config = timm.get_pretrained_cfg(name)
        if image_size is not None and config is not None and config.fixed_input_size:
            options["img_size"] = image_size
        return timm.create_model(name, pretrained=pretrained, **options)
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"{name} cannot be built{asked}: {str(error).rstrip('.')}.") from error
