"""The loss that a simulated step ends in, when the caller names none."""

from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves


def default_loss(output: Any) -> torch.Tensor:
    """Cross-entropy for an output of shape (batch, classes); the mean of all floating outputs otherwise."""
    if _is_logits(output):
        return F.cross_entropy(output, torch.zeros(output.shape[0], dtype=torch.long, device=output.device))
    means = [t.float().mean() for t in tree_leaves(output) if isinstance(t, torch.Tensor) and t.is_floating_point()]
    return torch.stack(means).sum()


def describe_loss(output: Any) -> str:
    """What `default_loss` does with this output, in words."""
    if _is_logits(output):
        return "loss: cross-entropy of the (batch, classes) output"
    return "loss: the mean of the output, which is not of shape (batch, classes)"


def _is_logits(output: Any) -> bool:
    return isinstance(output, torch.Tensor) and output.ndim == 2 and output.shape[1] > 1 and output.is_floating_point()
