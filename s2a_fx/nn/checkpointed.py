"""A part of a model that keeps its inputs alone and runs again in the backward: torch's own checkpointing."""

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from s2a_fx.nn.recompute import Recomputed, needs_grad


class Checkpointed(Recomputed):
    """`torch.utils.checkpoint` around a part of the model; exact, random numbers included."""

    def forward(self, *arguments: Any) -> torch.Tensor:
        if not needs_grad(*arguments, *self.trained()):
            return self.body(*arguments)  # type: ignore[no-any-return]
        return checkpoint(self.body, *arguments, use_reentrant=False)  # type: ignore[no-any-return]
