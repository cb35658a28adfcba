"""Bytes that CUDA kernels allocate and free inside, where no dispatcher sees them.

A sum over rows, the gradient of a bias, puts what each block of threads has added up into a buffer that is wider than its result:
for 6,304 rows of 3,072 numbers 138 MB. The rules are those of ATen's `Reduce.cuh`, `setReduceConfig`; the sizes that come of them
are those of an H100's allocator, to the byte. cuDNN's workspaces are not counted.
"""

import math
from typing import Any

import torch

aten = torch.ops.aten

MULTIPROCESSORS = 132  # of an H100; it only bounds the buffers of wide results
THREADS = 2048  # that a multiprocessor holds
WARP = 32
BLOCK = 512  # threads of a reduction's block, all outputs of a vector together
FEWEST_VALUES, MOST_VALUES = 16, 256  # that a thread adds up


def cuda_scratch(func: Any, args: tuple[Any, ...], result: Any) -> int:
    """Bytes above operands and results at the worst moment inside `func(*args)`."""
    if func in (aten.sum.dim_IntList, aten.mean.dim) and isinstance(result, torch.Tensor) and args[0].is_floating_point():
        x, dims = args[:2]
        return _sum(x, {d % x.ndim for d in dims} if dims else set(range(x.ndim)), max(4, result.element_size()))
    return 0


def _sum(x: torch.Tensor, reduced: set[int], accumulator: int) -> int:
    order = sorted((d for d in range(x.ndim) if x.shape[d] > 1), key=lambda d: x.stride(d))
    if not order or order[0] in reduced or x.stride(order[0]) != 1:
        return 0  # threads side by side add up one result: a number for each block at most
    side_by_side = math.prod(x.shape[d] for d in order[: next((i for i, d in enumerate(order) if d in reduced), len(order))])
    outputs = math.prod(x.shape[d] for d in order if d not in reduced)
    inputs = math.prod(x.shape[d] for d in order if d in reduced)
    vector = next(v for v in (4, 2, 1) if side_by_side % v == 0)
    width, height = _block(outputs // vector, inputs, BLOCK // vector)
    values = inputs
    if values < min(height * FEWEST_VALUES, MOST_VALUES):
        return 0  # not even the threads of a block share a result
    values = -(-values // height)
    grid = -(-(outputs // vector) // width)
    room = MULTIPROCESSORS * (THREADS // (width * height))
    if values < MOST_VALUES or grid > room:
        return 0
    blocks = max(min(-(-room // grid), -(-values // FEWEST_VALUES)), -(-values // MOST_VALUES))
    return accumulator * outputs * blocks * width * vector if blocks > 1 else 0


def _block(across: int, along: int, threads: int) -> tuple[int, int]:
    """Width and height of a block of threads."""
    widest, highest = (threads if n >= threads else 1 << (n.bit_length() - 1) for n in (across, along))
    height = min(highest, threads // min(widest, WARP))
    return min(widest, threads // height), height
