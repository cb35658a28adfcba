"""Coded activations: the forward to the last bit, masked gradients exact, binned ones within their bins, bytes as told."""

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from saved_bytes import Kept, cosine
from torch.library import opcheck

from s2a_fx.codecs.bins import best_bins
from s2a_fx.codecs.packing import packed_width
from s2a_fx.ops import flat
from s2a_fx.ops.activation import BINNED, binned, masked

SHAPES = st.lists(st.integers(0, 7), min_size=1, max_size=4).map(tuple)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
PLAIN = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "elu": F.elu,
    "selu": F.selu,
    "softplus": F.softplus,
}
INFINITY = float("inf")
MASKED = {
    "relu": ([], F.relu),
    "relu6": ([], F.relu6),
    "leaky_relu": ([0.3], lambda x: F.leaky_relu(x, 0.3)),
    "hardsigmoid": ([], F.hardsigmoid),
    "hardtanh": ([-0.7, 1.3], lambda x: F.hardtanh(x, -0.7, 1.3)),
    "clamp": ([-0.7, 1.3], lambda x: torch.clamp(x, -0.7, 1.3)),
    "clamp from below": ([0.3, INFINITY], lambda x: torch.clamp(x, min=0.3)),
    "clamp from above": ([-INFINITY, 0.3], lambda x: torch.clamp(x, max=0.3)),
}


def name_of(case):
    return case.split()[0]


def noncontiguous(shape, dtype):
    return (3 * torch.randn(*shape, 2)).to(dtype)[..., 0].detach().requires_grad_()


def gradient(y, x, grad):
    return torch.autograd.grad(y, x, grad)[0]


def layouts():
    """Tensors that lie in memory in uncommon ways."""
    image = torch.randn(2, 16, 6, 10)
    last = image.to(memory_format=torch.channels_last)
    return {
        "channels_last": last,
        "rows of channels_last": last[:, :, ::2],
        "channels of channels_last": last[:, :8],
        "rows of contiguous": image[:, :, ::2],
        "transposed": image.transpose(1, 3),
        "expanded": image[:1, :, :1, :1].expand(2, 16, 6, 10),
        "channels_last_3d": torch.randn(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d),
        "one channel": torch.randn(2, 1, 6, 10).to(memory_format=torch.channels_last),
        "a scalar": torch.randn(()),
    }


def test_a_plain_function_for_every_name():
    assert PLAIN.keys() == BINNED.keys()


@pytest.mark.parametrize("case", MASKED)
@settings(max_examples=25, deadline=None)
@given(SHAPES, DTYPES)
def test_masked_is_exact(case, shape, dtype):
    options, plain = MASKED[case]
    x = noncontiguous(shape, dtype)
    y, reference = masked(x, name_of(case), options)[0], plain(x)
    assert torch.equal(y, reference)
    grad = torch.randn_like(y)
    torch.testing.assert_close(gradient(y, x, grad), gradient(reference, x, grad), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", MASKED)
def test_masked_is_exact_at_its_bounds(case, dtype):
    options, plain = MASKED[case]
    x = torch.tensor([0.0, -0.0, 6.0, 3.0, -3.0, -0.7, 1.3, 0.3, 1e-7, -1e-7]).to(dtype).requires_grad_()
    y, reference = masked(x, name_of(case), options)[0], plain(x)
    assert torch.equal(y, reference)
    grad = torch.ones_like(x)
    torch.testing.assert_close(gradient(y, x, grad), gradient(reference, x, grad), rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", layouts())
def test_masked_in_any_memory_layout(layout):
    x = layouts()[layout].detach().requires_grad_()
    y, reference = masked(x, "relu", [])[0], F.relu(x)
    assert torch.equal(y, reference)
    assert y.stride() == reference.stride()
    for grad in (torch.randn_like(reference), torch.randn(reference.shape)):
        assert torch.equal(gradient(masked(x, "relu", [])[0], x, grad), gradient(F.relu(x), x, grad))


@pytest.mark.parametrize("layout", layouts())
def test_binned_in_any_memory_layout(layout):
    x = layouts()[layout].detach().requires_grad_()
    y, reference = binned(x, "gelu", 4)[0], F.gelu(x)
    assert torch.equal(y, reference)
    assert y.stride() == reference.stride()
    grad = torch.randn(reference.shape)
    torch.testing.assert_close(gradient(y, x, grad), grad * slope(x, "gelu", 4))


def slope(x, name, bits):
    """The level of each element's bin, looked up."""
    bins = best_bins(BINNED[name], bits)
    return torch.tensor(bins.levels)[torch.bucketize(x.detach().float(), torch.tensor(bins.boundaries), right=True)]


@pytest.mark.parametrize("name", PLAIN)
@settings(max_examples=20, deadline=None)
@given(SHAPES, DTYPES, st.integers(1, 5))
def test_binned_has_the_plain_forward_and_the_slope_of_its_bin(name, shape, dtype, bits):
    x = noncontiguous(shape, dtype)
    y = binned(x, name, bits)[0]
    assert torch.equal(y, PLAIN[name](x))
    grad = torch.randn_like(y)
    torch.testing.assert_close(gradient(y, x, grad), (grad.float() * slope(x, name, bits)).to(dtype))


@pytest.mark.parametrize("name", PLAIN)
def test_binned_gradient_is_near_the_exact_one(name):
    x = (1.5 * torch.randn(64, 64) - 0.5).requires_grad_()  # as the prior
    grad = torch.randn_like(x)
    exact = gradient(PLAIN[name](x), x, grad)
    cosines = [cosine(gradient(binned(x, name, bits)[0], x, grad), exact) for bits in (1, 2, 4)]
    assert cosines == sorted(cosines)
    assert cosines[-1] > 0.99


@pytest.mark.parametrize("name", ["gelu", "tanh"])
def test_binned_gradient_at_8_bits_is_close(name):
    x = (1.5 * torch.randn(64, 64) - 0.5).requires_grad_()
    grad = torch.randn_like(x)
    actual, exact = gradient(binned(x, name, 8)[0], x, grad), gradient(PLAIN[name](x), x, grad)
    assert cosine(actual, exact) > 0.9999
    torch.testing.assert_close(actual, exact, rtol=0, atol=0.02 * grad.abs().max().item())


@pytest.mark.parametrize("shape", [(3, 1024), (5, 64), (3, 7), (2, 3, 5, 8), (1,), (0, 4)])
@pytest.mark.parametrize("bits", [1, 3, 4, 6])
def test_bytes_kept_are_the_packed_codes(shape, bits):
    x = torch.randn(shape, requires_grad=True)
    with Kept() as kept:
        y = binned(x, "silu", bits)[0]
    count, width = flat.row_count(x.numel())
    assert kept.nbytes == count * packed_width(width, bits)
    assert kept.nbytes <= -(-x.numel() // 64) * 64 * bits / 8
    with Kept() as kept:
        z = masked(x, "relu", [])[0]
    assert kept.nbytes == count * packed_width(width, 1)
    del y, z


def test_float64_keeps_its_forward():
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    y = binned(x, "gelu", 4)[0]
    assert torch.equal(y, F.gelu(x))
    assert gradient(y, x, torch.ones_like(y)).dtype is torch.float64


def test_an_output_that_nobody_reads_has_no_gradient():
    x = torch.randn(4, 8, requires_grad=True)
    unread = binned(x, "gelu", 4)[0]
    assert unread.requires_grad
    assert torch.equal(gradient(x * 2, x, torch.ones(4, 8)), torch.full((4, 8), 2.0))


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        (binned, (torch.randn(3, 5, requires_grad=True), "gelu", 4)),
        (binned, (torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last).requires_grad_(), "silu", 3)),
        (binned, (torch.randn(4, 64), "tanh", 1)),
        (masked, (torch.randn(3, 5, requires_grad=True), "relu", [])),
        (masked, (torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last).requires_grad_(), "clamp", [-1.0, 1.0])),
        (masked, (torch.randn(4, 64), "leaky_relu", [0.1])),
    ],
)
def test_opcheck(op, arguments):
    assert set(opcheck(op, arguments).values()) == {"SUCCESS"}
