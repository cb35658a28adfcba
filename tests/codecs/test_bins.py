"""Bins of a derivative: sorted, better with every bit, and never worse than bins cut without the derivative in mind."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from s2a_fx.codecs.bins import PRIOR, best_bins, encode_bins, scale_by_bins
from s2a_fx.codecs.packing import packed_width

FUNCTIONS = {"gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh, "hardswish": F.hardswish}
BITS = range(1, 6)


def derivative(function, x):
    x = x.double().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


def grid():
    """Points between -5 and 5 deviations, and the weight of each under the prior."""
    mean, deviation = PRIOR
    x = torch.linspace(mean - 5 * deviation, mean + 5 * deviation, 20011, dtype=torch.float64)
    weight = torch.exp(-0.5 * ((x - mean) / deviation) ** 2)
    return x, weight / weight.sum()


def error(function, boundaries, levels):
    """Expected squared error of the derivative."""
    x, weight = grid()
    codes = torch.bucketize(x, torch.as_tensor(boundaries, dtype=torch.float64), right=True)
    return (weight * (derivative(function, x) - torch.as_tensor(levels, dtype=torch.float64)[codes]) ** 2).sum().item()


def means(function, boundaries):
    """The best levels for given boundaries."""
    x, weight = grid()
    codes = torch.bucketize(x, boundaries, right=True)
    total = torch.zeros(len(boundaries) + 1, dtype=torch.float64)
    mass = total.index_add(0, codes, weight)
    return total.index_add(0, codes, weight * derivative(function, x)) / mass.clamp_min(1e-30)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("bits", BITS)
def test_boundaries_are_sorted_and_levels_lie_in_the_derivative_s_range(name, bits):
    bins = best_bins(FUNCTIONS[name], bits)
    assert len(bins.levels) == 2**bits
    assert len(bins.boundaries) == 2**bits - 1
    assert all(a < b for a, b in itertools.pairwise(bins.boundaries))
    slopes = derivative(FUNCTIONS[name], torch.linspace(-12, 12, 4001))
    assert slopes.min() - 1e-3 <= min(bins.levels)
    assert max(bins.levels) <= slopes.max() + 1e-3


@pytest.mark.parametrize("name", FUNCTIONS)
def test_error_falls_with_every_bit(name):
    errors = [error(FUNCTIONS[name], *vars(best_bins(FUNCTIONS[name], bits)).values()) for bits in BITS]
    assert all(b < a / 2 for a, b in itertools.pairwise(errors))
    assert errors[3] < 2e-3  # 4 bits


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("bits", BITS)
def test_no_other_boundaries_do_better(name, bits):
    function, bins = FUNCTIONS[name], best_bins(FUNCTIONS[name], bits)
    best = error(function, bins.boundaries, bins.levels)
    uniform = torch.linspace(-4, 4, 2**bits + 1, dtype=torch.float64)[1:-1]
    quantiles = torch.special.ndtri(torch.arange(1, 2**bits, dtype=torch.float64) / 2**bits) * PRIOR[1] + PRIOR[0]
    generator = torch.Generator().manual_seed(bits)
    moved = torch.tensor(bins.boundaries, dtype=torch.float64)
    moved = (moved + 0.05 * torch.randn(len(moved), generator=generator, dtype=torch.float64)).sort().values
    for boundaries in (uniform, quantiles, moved):
        assert best <= error(function, boundaries, means(function, boundaries)) * (1 + 1e-6) + 1e-7


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient_is_scaled_by_the_level_of_each_element_s_bin(bits, dtype):
    bins = best_bins(F.gelu, bits)
    x, grad = torch.randn(5, 24).to(dtype), torch.randn(5, 24).to(dtype)
    packed = encode_bins(x, list(bins.boundaries), bits)
    assert packed.shape == (5, packed_width(24, bits))
    codes = torch.bucketize(x.float(), torch.tensor(bins.boundaries), right=True)
    expected = (grad.float() * torch.tensor(bins.levels)[codes]).to(dtype)
    assert torch.equal(scale_by_bins(grad, packed, list(bins.levels), bits), expected)


def test_bins_may_be_asked_for_among_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        bins = best_bins(F.softplus, 2)
    assert len(bins.levels) == 4
