"""The model of a run, with the weights that it begins with."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_data_config
from timm.models import adapt_input_conv, load_state_dict
from torch import nn

from s2a_fx.errors import InputError
from s2a_fx.finetune.options import FinetuneOptions
from s2a_fx.graph.torch_internals import BatchNorm
from s2a_fx.zoo import create_model


def build_model(options: FinetuneOptions, classes: int, weights: bool = True) -> tuple[nn.Module, tuple[str, ...]]:
    """timm's model with a head for `classes`, and the names of the head's parameters that the weights lack: they begin at zero.

    Args:
        weights: read them from the options' source; otherwise they are random.

    Raises:
        InputError: timm has no such model, or the file's weights are another's.
    """
    pretrained = options.pretrained and weights
    try:
        model = create_model(
            options.model, num_classes=classes, image_size=options.image_size, pretrained=pretrained, **options.model_options
        )
    except OSError as error:
        raise InputError(
            f"{options.model}: its weights cannot be had from the hub: {str(error).rstrip('.')}. Give a file with --checkpoint."
        ) from error
    new: tuple[str, ...] = ()
    if options.checkpoint and weights:
        new = load_weights(model, options.checkpoint)
    elif pretrained and classes != _config(model)["num_classes"]:
        new = tuple(n for n, _ in model.named_parameters() if n.startswith(_heads(model)))
    with torch.no_grad():
        for name in new:  # a head that knows nothing says nothing: timm's random one would have to be unlearned first
            model.get_parameter(name).zero_()
    return model, new


def data_config(model: nn.Module, options: FinetuneOptions) -> dict[str, Any]:
    """The images that the run gives to the model, as timm tells them: `input_size` (C, H, W), `mean`, `std`, `crop_pct`, ..."""
    config: dict[str, Any] = resolve_data_config({"crop_pct": options.crop_pct}, model=model)
    channels, *sides = config["input_size"]
    if options.image_size is not None:
        sides = [options.image_size] * 2
    return {**config, "input_size": (options.channels or channels, *sides)}


def batch_norms(model: nn.Module) -> tuple[str, ...]:
    """The paths of a model's batch norms."""
    return tuple(path for path, module in model.named_modules() if isinstance(module, BatchNorm))


def load_weights(model: nn.Module, file: Path) -> tuple[str, ...]:
    """Read timm weights from a file into the model; the names of the head's parameters that it has not, or of another size.

    Only tensors are read: no code that a file may hold is run.

    Raises:
        InputError: there is no such file, it holds no weights, or not this model's.
    """
    if not file.is_file():
        raise InputError(f"{file}: there is no such file; give timm weights, .safetensors or a state dict written by torch.save.")
    try:
        found = load_state_dict(str(file), weights_only=True)
        adapt = getattr(inspect.getmodule(type(model)), "checkpoint_filter_fn", None)
        found = adapt(found, model) if adapt else found  # timm's own: position embeddings for another size of image
        tensors = {name: t for name, t in found.items() if isinstance(t, torch.Tensor)}
    except Exception as error:  # each format has errors of its own
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{file}: cannot be read as weights: {first}; give .safetensors or a state dict written by torch.save."
        ) from error
    own = model.state_dict()
    heads = _heads(model)
    for name in _first_convolutions(model):  # as timm has it for weights from the hub: those of colours added up serve grey images
        if name in tensors and tensors[name].ndim == own[name].ndim == 4 and tensors[name].shape[1] == 3:
            tensors[name] = adapt_input_conv(own[name].shape[1], tensors[name])
    of_head = tuple(n for n in own if n.startswith(heads) and (n not in tensors or tensors[n].shape != own[n].shape))
    counts = ".num_batches_tracked"  # a batch norm that has a momentum needs none, and older files hold none
    missing = [name for name in own if name not in tensors and name not in of_head and not name.endswith(counts)]
    strange = [name for name in tensors if name not in own and not name.startswith(heads)]
    sizes = [n for n, t in tensors.items() if n in own and t.shape != own[n].shape and n not in of_head]
    for kind, names in (("lacks", missing), ("also has", strange), ("has in another size", sizes)):
        if names:
            raise InputError(
                f"{file}: the weights of another model: {kind} {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}; "
                "give weights of the model that is tuned."
            )
    model.load_state_dict({n: t for n, t in tensors.items() if n in own and n not in of_head}, strict=False)
    return of_head


def _config(model: nn.Module) -> Any:
    return model.pretrained_cfg


def _heads(model: nn.Module) -> tuple[str, ...]:
    return tuple(f"{name}." for name in _names(_config(model)["classifier"]))


def _first_convolutions(model: nn.Module) -> tuple[str, ...]:
    return tuple(f"{name}.weight" for name in _names(_config(model).get("first_conv")))


def _names(told: str | Sequence[str] | None) -> Sequence[str]:
    return (told,) if isinstance(told, str) else told or ()
