"""A part of a model that keeps its inputs alone and runs again in the backward: torch's own checkpointing."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from s2a_fx.nn.recompute import Recomputed, WeightState, needs_grad


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
    """The context in which a part runs again: as often as a backward asks, with the weights and modes of its forward.

    A batch that was counted in the forward is not counted again: running statistics stay as they are.
    """

    def __init__(self, body: torch.nn.Module) -> None:
        self.state = WeightState(body)
        self.norms = [m for m in body.modules() if isinstance(m, _BatchNorm)]
        self.before: list[Any] = []
        self.restoring: AbstractContextManager[None] | None = None

    def contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """The contexts of the forward and of each further run."""
        return nullcontext(), self  # type: ignore[return-value]

    def __enter__(self) -> None:
        self.restoring = self.state.restore()
        self.restoring.__enter__()
        self.before = [(n.momentum, None if (count := n.num_batches_tracked) is None else count.clone()) for n in self.norms]
        for norm in self.norms:
            norm.momentum = 0.0

    def __exit__(self, *error: Any) -> None:
        for norm, (momentum, count) in zip(self.norms, self.before, strict=True):
            norm.momentum = momentum
            if count is not None:
                assert isinstance(norm.num_batches_tracked, torch.Tensor)
                norm.num_batches_tracked.copy_(count)
        assert self.restoring is not None
        self.restoring.__exit__(*error)
