"""Coded layer norm and RMS norm: the forward to the last bit, gradients near the exact ones, bytes as told."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from saved_bytes import Kept, cosine
from torch.library import opcheck

from s2a_fx.codecs.rows import Rows
from s2a_fx.nn.coded import CodedLayerNorm

EPS = 1e-5


def plain(x, weight, bias, centered):
    shape = (x.shape[-1],)
    return F.layer_norm(x, shape, weight, bias, EPS) if centered else F.rms_norm(x, shape, weight, EPS)


def leaf(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype).requires_grad_()


def parameters(width, centered, dtype=torch.float32):
    return leaf(width, dtype=dtype), leaf(width, dtype=dtype) if centered else None


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 5), max_size=3),
    st.sampled_from([8, 24, 64]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.booleans(),
    st.integers(1, 8),
)
def test_forward_is_the_plain_one(shape, width, dtype, centered, bits):
    x = torch.randn(*shape, width, 2).to(dtype)[..., 0].detach().requires_grad_()
    weight, bias = parameters(width, centered, dtype)
    y = CodedLayerNorm(EPS, centered, bits)(x, weight, bias)
    assert torch.equal(y, plain(x, weight, bias, centered))
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert (grad.shape, grad.dtype) == (x.shape, x.dtype)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize(
    ("dtype", "bits", "least"),
    [
        (torch.float32, 8, 0.9999),
        (torch.float32, 4, 0.99),
        (torch.float32, 1, 0.6),
        (torch.bfloat16, 8, 0.999),
        (torch.float16, 8, 0.999),
    ],
)
def test_gradients_are_near_the_exact_ones(centered, dtype, bits, least):
    x = (torch.randn(2, 9, 64) * 3 + 0.5).to(dtype).requires_grad_()
    weight, bias = parameters(64, centered, dtype)
    leaves = [t for t in (x, weight, bias) if t is not None]
    grad = torch.randn(2, 9, 64).to(dtype)
    actual = torch.autograd.grad(CodedLayerNorm(EPS, centered, bits)(x, weight, bias), leaves, grad)
    exact = torch.autograd.grad(plain(x, weight, bias, centered), leaves, grad)
    for a, e in zip(actual, exact, strict=True):
        assert (a.dtype, a.shape) == (e.dtype, e.shape)
        assert cosine(a, e) > least
    if centered and dtype is torch.float32:
        torch.testing.assert_close(actual[2], exact[2])  # needs no code


@pytest.mark.parametrize("centered", [True, False])
def test_gradient_of_rows_far_from_zero(centered):
    x = (torch.randn(6, 64) + 30).requires_grad_()
    grad = torch.randn(6, 64)
    (actual,) = torch.autograd.grad(CodedLayerNorm(EPS, centered, 8)(x), x, grad)
    (exact,) = torch.autograd.grad(plain(x, None, None, centered), x, grad)
    assert cosine(actual, exact) > 0.999


def test_constant_rows_have_a_finite_gradient():
    x = torch.full((3, 16), 2.0, requires_grad=True)
    (grad,) = torch.autograd.grad(CodedLayerNorm(EPS, True, 4)(x), x, torch.randn(3, 16))
    assert grad.isfinite().all()


def test_a_weight_of_zeros_has_the_exact_gradient():
    x, weight, bias = leaf(5, 16), torch.zeros(16, requires_grad=True), leaf(16)
    grad = torch.randn(5, 16)
    actual = torch.autograd.grad(CodedLayerNorm(EPS, True, 8)(x, weight, bias), weight, grad)[0]
    assert cosine(actual, torch.autograd.grad(plain(x, weight, bias, True), weight, grad)[0]) > 0.999


@pytest.mark.parametrize("needed", [("x",), ("weight",), ("bias",), ("x", "bias"), ("weight", "bias")])
def test_only_what_needs_a_gradient_gets_one(needed):
    tensors = {name: torch.randn(shape) for name, shape in (("x", (5, 16)), ("weight", (16,)), ("bias", (16,)))}
    for name in needed:
        tensors[name].requires_grad_()
    CodedLayerNorm(EPS, True, 8)(*tensors.values()).square().sum().backward()
    assert {name for name, t in tensors.items() if t.grad is not None} == set(needed)


@pytest.mark.parametrize(("shape", "shift"), [((4, 64), 1), ((2, 15, 24), 1), ((2, 16, 24), 24), ((2, 4, 5, 8), 8)])
@pytest.mark.parametrize("bits", [1, 4, 6, 8])
@pytest.mark.parametrize("centered", [True, False])
def test_bytes_kept_are_codes_ranges_a_number_a_row_and_a_channel_of_an_image_that_has_rows_enough(shape, shift, bits, centered):
    x, weight = leaf(*shape), leaf(shape[-1])
    with Kept(weight) as kept:
        y = CodedLayerNorm(EPS, centered, bits)(x, weight)
    rows = x.numel() // shape[-1]
    assert kept.nbytes == Rows(bits).nbytes(rows, shape[-1]) + 2 * rows + shape[0] * shift
    del y


def test_permuted_images():
    """As LayerNorm2d has it: channels moved last and back."""
    x = leaf(2, 16, 5, 5)
    layer, grad = CodedLayerNorm(EPS, True, 8), torch.randn(2, 16, 5, 5)
    results = []
    for norm in (layer, lambda t: plain(t, None, None, True)):
        y = norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        results.append((y, *torch.autograd.grad(y, x, grad)))
    assert torch.equal(results[0][0], results[1][0])
    assert cosine(results[0][1], results[1][1]) > 0.9999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast(dtype):
    x, weight, bias = leaf(4, 16, dtype=dtype), leaf(16), leaf(16)
    with torch.autocast("cpu", torch.bfloat16):
        y = CodedLayerNorm(EPS, True, 8)(x, weight, bias)
        reference = plain(x, weight, bias, True)
    assert y.dtype is reference.dtype
    assert torch.equal(y, reference)
    grad = torch.randn_like(y)
    for a, e in zip(
        torch.autograd.grad(y, (x, weight, bias), grad), torch.autograd.grad(reference, (x, weight, bias), grad), strict=True
    ):
        assert a.dtype is e.dtype
        assert cosine(a, e) > 0.999


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("trained", [True, False])
def test_opcheck(centered, trained):
    x = torch.randn(3, 5, 16, requires_grad=trained)
    weight, bias = torch.randn(16, requires_grad=trained), torch.randn(16) if centered else None
    arguments = layer_norm_arguments(x, weight, bias, centered)
    assert set(opcheck(torch.ops.s2a_fx.layer_norm.default, arguments).values()) == {"SUCCESS"}


def layer_norm_arguments(x, weight, bias, centered):
    """The operator's arguments, whatever further options it has: seen as the layer calls it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.s2a_fx.layer_norm.default:
                seen.append(args)
            return func(*args, **(kwargs or {}))

    with Spy():
        CodedLayerNorm(EPS, centered, 4)(x.detach().requires_grad_(), weight, bias)
    return (x, weight, bias, *seen[0][3:])
