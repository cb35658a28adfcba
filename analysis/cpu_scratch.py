"""Bytes that CPU kernels allocate and free inside, where no dispatcher sees them.

oneDNN works on blocked copies of a convolution's operands. The rules below were measured with torch.profiler's memory events on
AVX-512 and AVX2 machines (benchmarks/truth.py sets the peaks that come of them beside measured ones):

1. contiguous operands are copied to a blocked layout and the result is copied back, inputs of fewer than 16 channels apart;
2. channels-last operands stay where they are, only the weight is copied (twice where the kernel is larger than 1x1; with AVX2, a
   1x1 weight is padded to whole blocks of 24 outputs);
3. the weight's gradient of a channels-last depthwise convolution with a kernel above 3x3 is computed in a layout that pads each
   1x1 group to a whole vector block, 16x16 for AVX-512: 256 times the weight;
4. a bias that trains makes the backward compute the weight's gradient even if the weight is frozen;
5. the weight's gradient of a patch embedding (a kernel that is a multiple of 16, fewer than 16 channels) takes four copies of the
   weight and one image for each thread; with AVX2, so does that of any map lower than its kernel;
6. alone, a thread multiplies by 1x1 weights where they lie, without oneDNN, in batches of fewer than 16.

Batch norm's backward makes the gradient of its input twice, and drops the first, where input and gradient lie alike in memory (7).
"""

from collections.abc import Sequence
from typing import Any

import torch

aten = torch.ops.aten


def cpu_scratch(func: Any, args: tuple[Any, ...], result: Any) -> int:
    """Bytes above operands and results at the worst moment inside `func(*args)`."""
    if func is aten.convolution.default:
        x, weight = args[:2]
        if args[6]:  # transposed: what a backward does for the gradient of its input
            return _backward(x, result, weight, strided=max(args[3]) > 1, groups=args[8], mask=(True, False, False))
        if _is_product(x, weight, args[3], args[4]):
            return 0
        return _forward(x, weight, result, groups=args[8])
    if func is aten.convolution_backward.default:
        grad, x, weight = args[:3]
        if _is_product(x, weight, args[4], args[5]) and not args[7]:
            return 0
        return _backward(grad, x, weight, strided=max(args[4]) > 1, groups=args[9], mask=args[10])
    if func is aten.native_batch_norm_backward.default:
        grad, x = args[:2]
        return _bytes(x) if args[-1][0] and _channels_last(grad) == _channels_last(x) else 0  # (7)
    return 0


def _is_product(x: torch.Tensor, weight: torch.Tensor, stride: Sequence[int], padding: Sequence[int]) -> bool:
    if torch.get_num_threads() > 1 or len(x) >= 16:
        return False
    return weight.shape[1] == x.shape[1] and max(weight.shape[2:]) == 1 and max(stride) == 1 and not any(padding)  # (6)


def _forward(x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, groups: int) -> int:
    if x.ndim != 4:
        return 0
    w = _bytes(weight)
    if _channels_last(x, weight):
        padded = -len(weight) % 24 * (w // len(weight)) if max(weight.shape[2:]) == groups == 1 and _vector_block() == 8 else 0
        return w * _weight_copies(weight, groups) + padded  # (2)
    return max(_blocked(x) + w, _bytes(y))  # (1)


def _backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, strided: bool, groups: int, mask: tuple[bool, bool, bool]
) -> int:
    if x.ndim != 4:
        return 0
    w, go = _bytes(weight), _bytes(grad)
    needs_x, needs_weight, needs_bias = mask
    computes_weight = needs_weight or needs_bias
    unasked = w if needs_bias and not needs_weight else 0  # (4)
    depthwise = groups > 1 and groups == x.shape[1] == weight.shape[0]
    large = max(weight.shape[2:]) > 3
    if _channels_last(x, weight):
        copies = w * _weight_copies(weight, groups)
        if computes_weight and _is_low(x, weight):
            copies = _per_thread(x, w)  # (5)
        elif computes_weight:
            copies += w * _vector_block() ** 2 if depthwise and large else w  # (2), (3)
        return copies + unasked + (0 if _channels_last(grad) else go)
    gradient_of_x = max(go + w, _bytes(x) * (2 if strided else 1)) if needs_x else 0
    if not computes_weight:
        return gradient_of_x
    reordered = go if depthwise and large else go + _blocked(x)
    if _is_low(x, weight) or (x.shape[1] < 16 and weight.shape[3] % 16 == 0):
        reordered = _per_thread(x, w)  # (5)
    return max(reordered, w, gradient_of_x - w) + unasked + (go if _channels_last(grad) else 0)


def _per_thread(x: torch.Tensor, weight_bytes: int) -> int:
    return torch.get_num_threads() * (4 * weight_bytes + _bytes(x) // max(x.shape[0], 1))


def _is_low(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return x.shape[2] < weight.shape[2] and _vector_block() == 8


def _weight_copies(weight: torch.Tensor, groups: int) -> int:
    return 2 if groups == 1 and max(weight.shape[2:]) > 1 else 1


def _vector_block() -> int:
    return 16 if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else 8


def _blocked(x: torch.Tensor) -> int:
    return _bytes(x) if x.shape[1] >= 16 else 0


def _channels_last(*tensors: torch.Tensor) -> bool:
    return any(t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in tensors)


def _bytes(t: torch.Tensor) -> int:
    return t.numel() * t.element_size()
