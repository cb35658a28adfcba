"""Batch norm and max pooling that keep a few bits for the backward.

They are subclasses of torch's layers and take their place under the same path: parameters and buffers keep their names, and what
looks for a batch norm (`.eval()` to freeze its statistics, `SyncBatchNorm.convert_sync_batchnorm`) finds one. Where no gradient is
needed they are torch's layers: nothing is coded.
"""

import copy
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from s2a_fx.codecs.rows import Rows
from s2a_fx.graph import torch_internals
from s2a_fx.graph.torch_internals import BatchNorm
from s2a_fx.ops.batch_norm import batch_norm, frozen_batch_norm
from s2a_fx.ops.max_pool import max_pool

Module = TypeVar("Module", bound=nn.Module)


class CodedBatchNorm(BatchNorm):
    """Batch norm that keeps `bits` an element of its input, and nothing where the backward does not read it. Made by `of`.

    In train mode the statistics are those of the batch: the input is not kept if neither it nor the weight needs a gradient. In
    eval mode they are the running ones: the input is kept only if the weight is trained.
    """

    bits: int

    @staticmethod
    def of(norm: BatchNorm, bits: int = 8) -> "CodedBatchNorm":
        """The coded form of a batch norm, with its parameters, buffers, mode and hooks."""
        coded = taking_over(norm, _CODED[type(norm)])
        coded.bits = Rows(bits).bits
        return coded

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        x, weight, bias = input, self.weight, self.bias
        trained = [t is not None and t.requires_grad for t in (x, weight, bias)]
        if not (torch.is_grad_enabled() and any(trained)) or x.numel() <= x.shape[1]:
            return super().forward(x)  # of one value a channel, torch says what is wrong
        torch_internals.check_dimensions(self, x)
        if not self.training and self.running_mean is not None and self.running_var is not None:
            bits = self.bits if trained[1] else 0
            return frozen_batch_norm(x, weight, bias, self.running_mean, self.running_var, self.eps, bits)[0]  # type: ignore[no-any-return]
        factor = self._average_factor()
        running = (self.running_mean, self.running_var) if self.training and self.track_running_stats else (None, None)
        bits = self.bits if trained[0] or trained[1] else 0
        y, *_, mean, var = batch_norm(x, weight, bias, *running, factor, self.eps, bits)
        for kept, value in zip(running, (mean, var), strict=True):
            if kept is not None:
                kept.copy_(value)
        return y  # type: ignore[no-any-return]

    def inference_form(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        of_batch = self.running_mean is None and self.running_var is None
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, of_batch, 0.0, self.eps)

    def _average_factor(self) -> float:
        """How much the batch counts in the running statistics; counts the batch."""
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # the mean of all batches
                return 1 / float(self.num_batches_tracked)
        return 0.0 if self.momentum is None else self.momentum

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}"


class CodedBatchNorm1d(CodedBatchNorm, nn.BatchNorm1d):
    """`CodedBatchNorm` of (N, C) or (N, C, L)."""


class CodedBatchNorm2d(CodedBatchNorm, nn.BatchNorm2d):
    """`CodedBatchNorm` of (N, C, H, W)."""


class CodedBatchNorm3d(CodedBatchNorm, nn.BatchNorm3d):
    """`CodedBatchNorm` of (N, C, D, H, W)."""


_CODED: dict[type[BatchNorm], type[CodedBatchNorm]] = {
    nn.BatchNorm1d: CodedBatchNorm1d,
    nn.BatchNorm2d: CodedBatchNorm2d,
    nn.BatchNorm3d: CodedBatchNorm3d,
}

BATCH_NORMS = tuple(_CODED)
"""The layers that `CodedBatchNorm.of` takes; their subclasses may do more than normalize."""


def taking_over(module: nn.Module, kind: type[Module]) -> Module:
    """A module of another kind with the parameters, buffers, children, options, mode and hooks of `module`."""
    other = kind.__new__(kind)
    other.__dict__.update({name: copy.copy(v) if isinstance(v, dict) else v for name, v in module.__dict__.items()})
    return other


class CodedMaxPool(nn.MaxPool2d):
    """Max pooling that keeps the place of each maximum in its window: 4 bits for 3 by 3, not input and index. Exact."""

    def forward(self, input: torch.Tensor) -> Any:  # noqa: A002
        if not (torch.is_grad_enabled() and input.requires_grad):
            return super().forward(input)
        options = (pair(self.kernel_size), pair(self.stride), pair(self.padding), pair(self.dilation))
        return max_pool(input, *options, self.ceil_mode)[0]

    def inference_form(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        return F.max_pool2d(input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)


def pair(value: int | tuple[int, ...] | list[int]) -> list[int]:
    """An option of a 2-d layer, one number or one for each dimension, as two numbers."""
    numbers = [value] if isinstance(value, int) else list(value)
    return numbers * 2 if len(numbers) == 1 else numbers
