"""How a device differs from the fake CPU tensors that the analysis runs on; no device is needed to ask.

What is modelled is data; what is not is said: every `DeviceModel` carries its assumptions, and the report prints them.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from s2a_fx.analysis.cpu_scratch import cpu_scratch
from s2a_fx.analysis.cuda_scratch import cuda_scratch
from s2a_fx.errors import InputError
from s2a_fx.graph import torch_internals


def _no_scratch(func: Any, args: tuple[Any, ...], result: Any) -> int:
    return 0


def _as_they_are(func: Any, result: Any) -> Any:
    return result


@dataclass(frozen=True)
class DeviceModel:
    """What the analysis must know of a device.

    Attributes:
        name: `cpu` or `cuda`.
        granularity: the allocator rounds each storage up to a multiple of this many bytes.
        foreach: whether torch's optimizers take their multi-tensor form by default, whose temporaries are as large as the weights.
        assumptions: what the model takes for granted, in words.
        functions: a context in which calls go to the kernels that the device would pick.
        scratch: (operator, its arguments, its result) -> bytes that the kernel allocates and frees inside.
        results: (operator, its result on the CPU) -> its result on the device, where dtypes differ.
    """

    name: str
    granularity: int
    foreach: bool
    assumptions: tuple[str, ...]
    functions: Callable[[], AbstractContextManager[Any]]
    scratch: Callable[[Any, tuple[Any, ...], Any], int] = _no_scratch
    results: Callable[[Any, Any], Any] = _as_they_are

    def allocated(self, nbytes: int) -> int:
        """Bytes that the allocator takes for a storage of `nbytes`."""
        return -(-nbytes // self.granularity) * self.granularity


class _CudaKernels(TorchFunctionMode):
    """Call what CUDA would dispatch to: one of the fused attentions, and the dropout that keeps a bool mask."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _cuda_attention(*args, **kwargs)
        if func is F.dropout:
            return _cuda_dropout(*args, **kwargs)
        return func(*args, **kwargs)


def _cuda_results(func: Any, result: Any) -> Any:
    """Layer norm keeps mean and 1 / sigma in float32, whatever it normalizes; on the CPU in the dtype of its input."""
    if func is torch.ops.aten.native_layer_norm.default:
        y, *statistics = result
        return y, *(t if t.dtype == torch.promote_types(t.dtype, torch.float32) else t.float() for t in statistics)
    return result


def _cuda_dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:  # noqa: A002
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input


def _cuda_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Flash for 16-bit inputs without a mask, memory-efficient where head sizes are aligned, the unfused product otherwise.

    Hopper takes cuDNN's in the place of flash, which keeps the same but for a few bytes.
    """
    options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
    half = query.dtype in (torch.float16, torch.bfloat16)
    head = query.shape[-1]
    same_heads = query.ndim == 4 and query.shape[1] == key.shape[1]
    if half and attn_mask is None and same_heads and head % 8 == 0 and head <= 256:
        return torch_internals.ATTENTION_FLASH(query, key, value, **options)[0]
    if same_heads and head % (8 if half else 4) == 0:
        bias = None if attn_mask is None else _additive(attn_mask, query, key)
        return torch_internals.ATTENTION_EFFICIENT(query, key, value, bias, _needs_grad(query, key, value, bias), **options)[0]
    return torch_internals.ATTENTION_MATH(query, key, value, attn_mask, enable_gqa=enable_gqa, **options)[0]


def _needs_grad(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _additive(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    if mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(mask.logical_not(), -math.inf)
    return mask.expand(*query.shape[:-1], key.shape[-2])


CPU = DeviceModel(
    name="cpu",
    granularity=1,
    foreach=False,
    assumptions=(
        "CPU: the kernels that PyTorch picks for CPU tensors; dropout keeps a float mask",
        "CPU: oneDNN's reordered copies of a convolution's operands are counted by the rules measured in cpu_scratch.py",
    ),
    functions=nullcontext,
    scratch=cpu_scratch,
)

CUDA = DeviceModel(
    name="cuda",
    granularity=512,
    foreach=True,
    assumptions=(
        "CUDA: fused attention is flash or cuDNN's (16-bit) or memory-efficient; it keeps q, k, v, output and logsumexp",
        "CUDA: dropout keeps a bool mask; allocations are rounded up to 512 bytes; the optimizer runs in its foreach form",
        "CUDA: the partial results of a sum over rows are counted by the rules in cuda_scratch.py, for an H100's processors",
        "CUDA: cuBLAS and cuDNN workspaces, fragmentation and the CUDA context (hundreds of MB) come on top",
    ),
    functions=_CudaKernels,
    scratch=cuda_scratch,
    results=_cuda_results,
)


def device_model(name: str) -> DeviceModel:
    """The model of a device by name; raises `InputError` for a name other than `cpu` and `cuda`."""
    models = {model.name: model for model in (CPU, CUDA)}
    if name not in models:
        raise InputError(f"device: got {name!r}, wanted one of {', '.join(models)}.")
    return models[name]
