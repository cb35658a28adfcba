"""Codes of an activation's derivative: the real line cut into 2**bits bins, one slope for each.

An activation y = f(x) keeps x only to know f'(x) in the backward. The bins of least mean squared error of f', for x drawn from a
prior, are found by dynamic programming on a grid; f' need not be monotone. After Novikov et al., Few-Bit Backward (2023). The
pre-activations of trained networks lie lower and wider than N(0, 1): benchmarks/codec_table.py sets this prior beside others.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from s2a_fx.codecs.packing import cut, pack, unpack
from s2a_fx.fusion import fused
from s2a_fx.graph.torch_internals import without_dispatch_modes

PRIOR = (-0.5, 1.5)
"""Mean and deviation of the normal prior over pre-activations."""

_SPAN = 6.0
_GRID = 1201
_DELTA = 1e-5


@dataclass(frozen=True)
class Bins:
    """Bin i holds `boundaries[i - 1] <= x < boundaries[i]` and stands for the slope `levels[i]`."""

    boundaries: tuple[float, ...]
    levels: tuple[float, ...]


@fused
def encode_bins(x: torch.Tensor, boundaries: list[float], bits: int) -> torch.Tensor:
    """The bin of each element of `x` (rows, width), packed."""
    x = x.float()
    codes = torch.zeros_like(x)
    for boundary in boundaries:  # a sum of comparisons, in floats: neither bucketize nor a sum of bytes is vectorized
        codes = codes + (x >= boundary).float()
    return pack(codes, bits)


@fused
def scale_by_bins(grad: torch.Tensor, packed: torch.Tensor, levels: list[float], bits: int) -> torch.Tensor:
    """`grad` (rows, width) times the slope of each element's bin."""
    parts = zip(cut(grad, bits), unpack(packed, bits), strict=True)
    return torch.cat([(part.float() * _slopes(codes, levels)).to(grad.dtype) for part, codes in parts], 1)


def _slopes(codes: torch.Tensor, levels: list[float]) -> torch.Tensor:
    slopes = torch.full_like(codes, levels[0])
    for code, level in enumerate(levels[1:], start=1):
        slopes = torch.where(codes >= code, level, slopes)
    return slopes


@functools.cache
def best_bins(function: Callable[[torch.Tensor], torch.Tensor], bits: int, prior: tuple[float, float] = PRIOR) -> Bins:
    """The bins of least expected squared error of the derivative of `function`, x drawn from a normal `prior`."""
    mean, deviation = prior
    with without_dispatch_modes(), torch.no_grad():  # asked for from within fake tensors and kernels, too
        x = torch.linspace(mean - _SPAN * deviation, mean + _SPAN * deviation, _GRID, dtype=torch.float64, device="cpu")
        slope = (function(x + _DELTA) - function(x - _DELTA)) / (2 * _DELTA)
        return _bins_of(x, slope, torch.exp(-0.5 * ((x - mean) / deviation) ** 2), 2**bits)


def _bins_of(x: torch.Tensor, slope: torch.Tensor, weight: torch.Tensor, count: int) -> Bins:
    cuts, levels = _partition(slope, weight / weight.sum(), count)
    middles = (x[1:] + x[:-1]) / 2
    return Bins(tuple(float(middles[c - 1]) for c in cuts), tuple(levels))


def _partition(values: torch.Tensor, weights: torch.Tensor, count: int) -> tuple[list[int], list[float]]:
    """Cut a sequence into `count` runs of least weighted squared error: where the runs begin, but the first, and their means."""
    mass = torch.nn.functional.pad(weights.cumsum(0), (1, 0))
    first = torch.nn.functional.pad((weights * values).cumsum(0), (1, 0))
    second = torch.nn.functional.pad((weights * values * values).cumsum(0), (1, 0))

    def between(total: torch.Tensor) -> torch.Tensor:
        return total.unsqueeze(0) - total.unsqueeze(1)  # [i, j]: the run from i to j

    error = between(second) - between(first) ** 2 / between(mass).clamp_min(1e-300)
    size = values.numel()
    error = error.masked_fill(torch.ones(size + 1, size + 1).tril().bool(), torch.inf)  # a run is not empty
    best = error[0]
    choices = []
    for _ in range(count - 1):
        best, choice = (best.unsqueeze(1) + error).min(0)
        choices.append(choice)
    cuts = [size]
    for choice in reversed(choices):
        cuts.append(int(choice[cuts[-1]]))
    edges = [0, *reversed(cuts[1:]), size]
    means = [float((first[b] - first[a]) / (mass[b] - mass[a])) for a, b in itertools.pairwise(edges)]
    return edges[1:-1], means
