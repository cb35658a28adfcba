"""Autograd operators that keep compressed tensors; one file an operator, and the lines that each runs in one visible table."""

from collections.abc import Callable
from typing import Any

import torch

from s2a_fx.ops.attention import attention, attention_kernel
from s2a_fx.ops.gelu import gelu, gelu_kernel, silu, silu_kernel
from s2a_fx.ops.relu import relu, relu_kernel
from s2a_fx.ops.softmax import softmax, softmax_kernel, softmax_matmul, softmax_matmul_kernel

KERNELS: dict[Any, Callable[..., Any]] = {
    torch.ops.s2a_fx.gelu.default: gelu_kernel,
    torch.ops.s2a_fx.silu.default: silu_kernel,
    torch.ops.s2a_fx.relu.default: relu_kernel,
    torch.ops.s2a_fx.softmax.default: softmax_kernel,
    torch.ops.s2a_fx.softmax_matmul.default: softmax_matmul_kernel,
    torch.ops.s2a_fx.attention.default: attention_kernel,
}
"""Operator -> the PyTorch lines inside it: what an analysis runs to see the temporaries that the operator hides."""

SAVED: dict[str, tuple[str, ...]] = {
    "gelu": ("codes", "range"),
    "silu": ("codes", "range"),
    "relu": ("mask",),
    "softmax": ("codes", "range"),
    "softmax_matmul": ("value", "codes", "range", "dropout_mask"),
    "attention": ("query", "key", "value", "codes", "range", "dropout_mask"),
}
"""Operator -> the names of what it saves, in the order of its `save_for_backward`."""

__all__ = ["KERNELS", "SAVED", "attention", "gelu", "relu", "silu", "softmax", "softmax_matmul"]
