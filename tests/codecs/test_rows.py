"""Uniform codes a row: the error stays below half a step, whatever the magnitude; the size is what is kept."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import s2a_fx
from s2a_fx.codecs.rows import Rows

BITS = range(1, 9)
LARGEST = 1e30


def half_a_step(x, bits):
    """Half a step of each row's range, the range widened by the roundings of low and step to bfloat16."""
    x = x.double()
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    span = (high - low + low.abs() * 2**-7) * (1 + 2**-6)
    return span / (2**bits - 1) / 2 + 2**-22 * x.abs().amax(1, keepdim=True) + 1e-30


def coded(x, bits):
    codec = Rows(bits)
    return codec.decode(codec.encode(x))


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(BITS),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.floats(-3, 3),
    st.floats(0, 3),
    st.integers(0, 2**32),
)
def test_error_is_within_half_a_step_of_the_row_s_range(bits, dtype, shift, scale, seed):
    noise = torch.randn(6, 24, generator=torch.Generator().manual_seed(seed))
    x = (noise * scale + shift).to(dtype)
    back = coded(x, bits)
    assert back.dtype is torch.float32
    assert ((back.double() - x.double()).abs() <= half_a_step(x, bits)).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("magnitude", [1e-35, 1e-20, 1e-6, 1.0, 1e6, 1e20, LARGEST])
def test_any_magnitude(bits, magnitude):
    x = torch.randn(4, 16) * magnitude
    back = coded(x, bits)
    assert ((back.double() - x.double()).abs() <= half_a_step(x, bits)).all()


@pytest.mark.parametrize("bits", BITS)
def test_each_row_has_a_range_of_its_own(bits):
    x = torch.randn(3, 64) * torch.tensor([1e-4, 1.0, 1e4]).view(3, 1)
    assert torch.equal(coded(x, bits), torch.cat([coded(row.unsqueeze(0), bits) for row in x]))


@pytest.mark.parametrize("bits", BITS)
def test_a_row_of_zeros_is_exact_and_a_constant_one_nearly(bits):
    assert torch.equal(coded(torch.zeros(2, 8), bits), torch.zeros(2, 8))
    for value in (3.0, -3.0, 1e-12, -1e12):
        x = torch.full((2, 8), value)
        assert ((coded(x, bits) - x).abs() <= abs(value) / 100).all()


@pytest.mark.parametrize("bits", BITS)
def test_the_largest_and_the_smallest_are_never_cut_off(bits):
    x = torch.randn(64, 8) + 5
    back = coded(x, bits)
    step = 2 * half_a_step(x, bits)
    assert (back.amax(1, keepdim=True) >= x.amax(1, keepdim=True) - step / 2).all()
    assert (back.amin(1, keepdim=True) <= x.amin(1, keepdim=True) + step / 2).all()


def test_more_bits_less_error():
    x = torch.randn(32, 64)
    errors = [(coded(x, bits) - x).square().mean().item() for bits in BITS]
    assert errors == sorted(errors, reverse=True)
    assert all(b < a / 2.5 for a, b in itertools.pairwise(errors))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(1, 8), (5, 24), (7, 192), (0, 16)])
def test_nbytes_are_the_bytes_kept(bits, shape):
    kept = Rows(bits).encode(torch.randn(shape))
    assert sum(t.numel() * t.element_size() for t in kept) == Rows(bits).nbytes(*shape)


def test_no_rows():
    assert coded(torch.randn(0, 16), 6).shape == (0, 16)


@pytest.mark.parametrize("bits", [0, 9, -1, 2.0, True, "4", None])
def test_other_bits_are_refused(bits):
    with pytest.raises(s2a_fx.InputError, match="from 1 to 8"):
        Rows(bits)


def test_random_rounding_is_right_on_average():
    torch.manual_seed(0)
    x = torch.randn(20, 64)
    codec = Rows(2, stochastic=True)
    mean = torch.stack([codec.decode(codec.encode(x)) for _ in range(2000)]).mean(0)
    step = (x.amax(1, keepdim=True) - x.amin(1, keepdim=True)) / 3
    nearest = Rows(2).decode(Rows(2).encode(x))
    assert ((mean - x).abs() / step).max() < 0.06  # five deviations of the mean of 2000 draws
    assert ((nearest - x).abs() / step).max() > 0.4


def test_random_rounding_never_strays_a_step():
    torch.manual_seed(0)
    x = torch.randn(20, 64) * torch.logspace(-3, 3, 20).unsqueeze(1)
    codec = Rows(4, stochastic=True)
    step = (x.amax(1, keepdim=True) - x.amin(1, keepdim=True)) / 15
    assert ((codec.decode(codec.encode(x)) - x).abs() <= 1.02 * step).all()


def test_the_same_seed_rounds_the_same():
    x = torch.randn(20, 64)
    codec = Rows(3, stochastic=True)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(codec.encode(x)[0])
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
