"""Autograd operators that keep compressed tensors; one file an operator, and the lines that each runs in one visible table."""

from collections.abc import Callable
from typing import Any

import torch

from s2a_fx.fusion import LINES, compiling
from s2a_fx.ops.activation import binned, binned_kernel, masked, masked_kernel
from s2a_fx.ops.attention import attention, attention_kernel
from s2a_fx.ops.batch_norm import batch_norm, batch_norm_kernel, frozen_batch_norm, frozen_batch_norm_kernel
from s2a_fx.ops.dropout import dropout, dropout_kernel
from s2a_fx.ops.frozen_convolution import frozen_convolution, frozen_convolution_kernel
from s2a_fx.ops.gelu import gelu, gelu_kernel, silu, silu_kernel
from s2a_fx.ops.layer_norm import layer_norm, layer_norm_kernel
from s2a_fx.ops.max_pool import max_pool, max_pool_kernel
from s2a_fx.ops.relu import relu, relu_kernel
from s2a_fx.ops.softmax import softmax, softmax_kernel, softmax_matmul, softmax_matmul_kernel

KERNELS: dict[Any, Callable[..., Any]] = {
    torch.ops.s2a_fx.gelu.default: gelu_kernel,
    torch.ops.s2a_fx.silu.default: silu_kernel,
    torch.ops.s2a_fx.relu.default: relu_kernel,
    torch.ops.s2a_fx.softmax.default: softmax_kernel,
    torch.ops.s2a_fx.softmax_matmul.default: softmax_matmul_kernel,
    torch.ops.s2a_fx.attention.default: attention_kernel,
    torch.ops.s2a_fx.binned.default: binned_kernel,
    torch.ops.s2a_fx.masked.default: masked_kernel,
    torch.ops.s2a_fx.dropout.default: dropout_kernel,
    torch.ops.s2a_fx.layer_norm.default: layer_norm_kernel,
    torch.ops.s2a_fx.frozen_convolution.default: frozen_convolution_kernel,
    torch.ops.s2a_fx.batch_norm.default: batch_norm_kernel,
    torch.ops.s2a_fx.frozen_batch_norm.default: frozen_batch_norm_kernel,
    torch.ops.s2a_fx.max_pool.default: max_pool_kernel,
}
"""Operator -> the PyTorch lines inside it, of which some may be fused operators."""


def lines_of(operator: Any) -> Callable[..., Any] | None:
    """What an analysis runs to see the temporaries inside an operator; None where there are none: fused operators, torch's own."""
    return KERNELS.get(operator) or (None if compiling() else LINES.get(operator))


SAVED: dict[str, tuple[str, ...]] = {
    "gelu": ("codes", "range"),
    "silu": ("codes", "range"),
    "relu": ("mask",),
    "softmax": ("codes", "range"),
    "softmax_matmul": ("value", "codes", "range", "dropout_mask"),
    "binned": ("codes",),
    "masked": ("codes",),
    "dropout": ("mask",),
    "layer_norm": ("codes", "ranges", "rstd", "shift", "weight"),
    "frozen_convolution": ("weight",),
    "batch_norm": ("codes", "ranges", "mean", "invstd", "weight"),
    "frozen_batch_norm": ("running_mean", "running_var", "weight", "codes", "ranges"),
    "max_pool": ("codes",),
    "attention": ("query", "key", "value", "codes", "range", "dropout_mask"),
}
"""Operator -> the names of what it saves, in the order of its `save_for_backward`."""

__all__ = [
    "KERNELS",
    "SAVED",
    "attention",
    "batch_norm",
    "binned",
    "dropout",
    "frozen_batch_norm",
    "frozen_convolution",
    "gelu",
    "layer_norm",
    "lines_of",
    "masked",
    "max_pool",
    "relu",
    "silu",
    "softmax",
    "softmax_matmul",
]
