"""Codes of probabilities: what comes back, what it takes, and that small ones are told apart."""

import pytest
import torch

import s2a_fx
from s2a_fx.codecs.powers import Powers
from s2a_fx.codecs.rows import Rows


def a_map(rows=50, width=197, sharpness=4.0):
    torch.manual_seed(0)
    return (torch.randn(rows, width) * sharpness).softmax(1)


@pytest.mark.parametrize("width", [8, 13, 197])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_takes_its_bytes_and_keeps_its_shape(bits, width):
    x = a_map(width=width)
    codec = Powers(bits)
    coded = codec.encode(x)
    assert sum(t.nbytes for t in coded) == codec.nbytes(50, width)
    assert codec.decode(coded, width).shape == x.shape


def test_each_element_is_within_half_a_step_of_its_root():
    x = a_map()
    root = x ** (1 / 3)
    step = (root.amax(1) - root.amin(1)) / 15 * 1.02
    decoded = Powers(4).decode(Powers(4).encode(x), 197)
    assert ((decoded ** (1 / 3) - root).abs() <= step.unsqueeze(1) / 2 + 1e-6).all()


def test_small_probabilities_are_nearer_than_in_even_codes():
    x = a_map(width=200)
    even = Rows(4).decode(Rows(4).encode(x))
    rooted = Powers(4).decode(Powers(4).encode(x), 200)
    small = x < x.amax(1, keepdim=True) / 20
    assert (rooted - x)[small].norm() < 0.3 * (even - x)[small].norm()


def test_nothing_negative_comes_back():
    decoded = Powers(2).decode(Powers(2).encode(torch.zeros(3, 8)), 8)
    assert (decoded >= 0).all()
    assert decoded.max() < 1e-6


@pytest.mark.parametrize("options", [{"bits": 0}, {"bits": 9}, {"bits": 4, "power": 0}, {"bits": 4, "power": 1.5}], ids=str)
def test_bad_options_are_refused(options):
    with pytest.raises(s2a_fx.InputError):
        Powers(**options)
