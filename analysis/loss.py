"""The loss that a simulated step ends in, when the caller names none."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from s2a_fx.errors import InputError
from s2a_fx.graph.torch_internals import tree_leaves


def default_loss(output: Any) -> torch.Tensor:
    """The model's own `loss` if it returns one by that name; cross-entropy for an output of shape (batch, classes); the sum of the
    means of all floating outputs otherwise."""
    if (own := _own_loss(output)) is not None:
        return own
    if _is_logits(output):
        return F.cross_entropy(output, torch.zeros(output.shape[0], dtype=torch.long, device=output.device))
    means = [t.float().mean() for t in tree_leaves(output) if isinstance(t, torch.Tensor) and t.is_floating_point()]
    if not means:
        raise InputError("the model has no floating output to train on; pass loss=, a function from its output to a scalar.")
    return torch.stack(means).sum()


def describe_loss(output: Any) -> str:
    """What `default_loss` does with this output, in words."""
    if _own_loss(output) is not None:
        return "loss: the model's own"
    if _is_logits(output):
        return "loss: cross-entropy of the (batch, classes) output"
    return "loss: the sum of the outputs' means, since the output is not of shape (batch, classes)"


def _is_logits(output: Any) -> bool:
    return isinstance(output, torch.Tensor) and output.ndim == 2 and output.shape[1] > 1 and output.is_floating_point()


def _own_loss(output: Any) -> torch.Tensor | None:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return loss if isinstance(loss, torch.Tensor) and loss.numel() == 1 and loss.is_floating_point() else None
