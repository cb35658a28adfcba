"""Classes and operators by where they are found: not all of them pickle."""

import importlib
import inspect
from dataclasses import dataclass
from typing import Any

import torch

from s2a_fx.graph import torch_internals


@dataclass(frozen=True)
class Reference:
    """A class or an operator that a module of Python holds."""

    module: str
    name: str

    @staticmethod
    def to(value: Any) -> Any:
        """`value` in a form that pickles."""
        if isinstance(value, torch_internals.Overload | torch_internals.OverloadPacket):
            return Reference("torch.ops", str(value))
        if inspect.isclass(value):
            return Reference(value.__module__, value.__qualname__)
        return value

    @staticmethod
    def follow(value: Any) -> Any:
        """What a reference stands for; a class that this process cannot find stays a reference."""
        if not isinstance(value, Reference):
            return value
        try:
            found: Any = torch.ops if value.module == "torch.ops" else importlib.import_module(value.module)
            for name in value.name.split("."):
                found = getattr(found, name)
        except (ImportError, AttributeError):
            return value
        return found
