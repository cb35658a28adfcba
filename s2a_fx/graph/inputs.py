"""How a model is called: example inputs, the tensors among them, and the structure of the result."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils._pytree import tree_flatten


@dataclass(frozen=True)
class Signature:
    names: tuple[str, ...]

    def arguments(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(leaves), {}

    def flatten_result(self, value: Any) -> tuple[list[Any], Any]:
        return tree_flatten(value)
