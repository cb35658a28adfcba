"""The code of a model: the globals of its files, and the line where something happens, which is neither torch's nor ours."""

import inspect
import os
import traceback
from pathlib import Path
from types import FrameType, FunctionType
from typing import Any

import torch
from torch import nn

_TORCH = f"{torch.__path__[0]}{os.sep}"
_OURS = f"{Path(__file__).parent}{os.sep}"


def classes_of(model: nn.Module) -> list[type]:
    """The classes of a model's modules and their bases, but for those of torch."""
    bases = dict.fromkeys(base for kind in dict.fromkeys(map(type, model.modules())) for base in kind.__mro__)
    return [base for base in bases if base.__module__.partition(".")[0] not in ("builtins", "torch")]


def namespaces_of(model: nn.Module) -> list[dict[str, Any]]:
    """The globals of the files in which these classes stand."""
    forwards = (vars(base).get("forward") for base in classes_of(model))
    own = (inspect.unwrap(f) for f in forwards if isinstance(f, FunctionType))  # a decorator's globals are those of its file
    return list({id(f.__globals__): f.__globals__ for f in own}.values())


def is_torch_file(filename: str) -> bool:
    """Whether a file is one of torch's; torchvision's and others' are not."""
    return filename.startswith(_TORCH)


def place_of_error(model: nn.Module, path: str, error: BaseException) -> str:
    """The module at `path` of `model`, and the line that raised an error."""
    module = model.get_submodule(path)
    place = f"{path or 'the model itself'} ({type(module).__name__})"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((_TORCH, _OURS))]
    return f"{place}, line {frames[-1].lineno} of {frames[-1].filename}" if frames else place


def line_of_frame(frame: FrameType | None, *packages: str) -> str | None:
    """The line that a frame, or what called it, is at, outside of these packages; None where there is none."""
    while frame is not None and _is_within(frame, packages):
        frame = frame.f_back
    return f"line {frame.f_lineno} of {frame.f_code.co_filename}" if frame is not None else None


def _is_within(frame: FrameType, packages: tuple[str, ...]) -> bool:
    filename = frame.f_code.co_filename
    return filename.startswith((_TORCH, _OURS)) or frame.f_globals.get("__name__", "").partition(".")[0] in packages


def first_line(error: BaseException) -> str:
    """The first line of an error's text, without its full stop."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")
