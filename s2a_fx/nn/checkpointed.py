"""A part of a model that keeps its inputs alone and runs again in the backward: torch's own checkpointing."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from s2a_fx.nn.recompute import ModuleState, Recomputed, needs_grad


class Checkpointed(Recomputed):
    """`torch.utils.checkpoint` around a part of the model; exact, random numbers and running statistics included."""

    def forward(self, *arguments: Any) -> torch.Tensor:
        if not needs_grad(*arguments, *self.trained()):
            return self.body(*arguments)  # type: ignore[no-any-return]
        if torch.compiler.is_compiling():  # whose graphs hold weights and modes, and count a batch once
            return checkpoint(self.body, *arguments, use_reentrant=False)  # type: ignore[no-any-return]
        again = _Again(self.body)
        return checkpoint(self.body, *arguments, use_reentrant=False, context_fn=again.contexts)  # type: ignore[no-any-return]


class _Again:
    """The context in which a part runs again, as often as a backward asks: with the tensors and modes of its forward.

    A batch that was counted in the forward is not counted again: running statistics stay as they are.
    """

    def __init__(self, body: nn.Module) -> None:
        self.state = ModuleState(body)

    def contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """The contexts of the forward and of each further run."""
        return self._forward(), self

    @contextmanager
    def _forward(self) -> Iterator[None]:
        yield
        self.state.end_forward()

    def __enter__(self) -> None:
        self.restoring = self.state.restore()
        self.restoring.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.restoring.__exit__(*error)
