"""A part of a model that keeps its inputs alone and runs again in the backward: torch's own checkpointing."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from s2a_fx.nn.recompute import Recomputed, needs_grad


class Checkpointed(Recomputed):
    """`torch.utils.checkpoint` around a part of the model; exact, random numbers and running statistics included."""

    def forward(self, *arguments: Any) -> torch.Tensor:
        if not needs_grad(*arguments, *self.trained()):
            return self.body(*arguments)  # type: ignore[no-any-return]
        norms = [m for m in self.body.modules() if isinstance(m, _BatchNorm)]
        if not norms:
            return checkpoint(self.body, *arguments, use_reentrant=False)  # type: ignore[no-any-return]

        def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
            return nullcontext(), _counted_once(norms)

        return checkpoint(self.body, *arguments, use_reentrant=False, context_fn=contexts)  # type: ignore[no-any-return]


@contextmanager
def _counted_once(norms: list[_BatchNorm]) -> Iterator[None]:
    """Inside, a batch that was counted in the forward is not counted again: running statistics stay as they are."""
    before = [(norm.momentum, None if (count := norm.num_batches_tracked) is None else count.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum = momentum
            if count is not None:
                assert isinstance(norm.num_batches_tracked, torch.Tensor)
                norm.num_batches_tracked.copy_(count)
