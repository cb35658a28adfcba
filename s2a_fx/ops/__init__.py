"""Autograd operators that keep compressed tensors; one file an operator, and the lines that each runs in one visible table."""

from collections.abc import Callable
from typing import Any

import torch

from s2a_fx.ops.activation import binned, binned_kernel, masked, masked_kernel
from s2a_fx.ops.attention import attention, attention_kernel
from s2a_fx.ops.dropout import dropout, dropout_kernel
from s2a_fx.ops.frozen_convolution import frozen_convolution, frozen_convolution_kernel
from s2a_fx.ops.fusion import LINES, compiling
from s2a_fx.ops.gelu import gelu, gelu_kernel, silu, silu_kernel
from s2a_fx.ops.layer_norm import layer_norm, layer_norm_kernel
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
    "layer_norm": ("codes", "ranges", "rstd", "weight"),
    "frozen_convolution": ("weight",),
    "attention": ("query", "key", "value", "codes", "range", "dropout_mask"),
}
"""Operator -> the names of what it saves, in the order of its `save_for_backward`."""

__all__ = [
    "KERNELS",
    "SAVED",
    "attention",
    "binned",
    "dropout",
    "frozen_convolution",
    "gelu",
    "layer_norm",
    "lines_of",
    "masked",
    "relu",
    "silu",
    "softmax",
    "softmax_matmul",
]
