"""A convolution with a frozen weight: output and gradients of the plain one, and nothing kept."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from saved_bytes import Kept
from torch.library import opcheck

from s2a_fx.nn.coded import FrozenConvolution
from s2a_fx.ops.frozen_convolution import frozen_convolution

PLAIN = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def both(x, weight, bias, stride, padding, dilation, groups):
    """(output, *gradients of x and bias) of the frozen and the plain convolution."""
    leaves = [t for t in (x, bias) if t is not None and t.requires_grad]
    options = [[value] * (x.ndim - 2) if isinstance(value, int) else list(value) for value in (stride, padding, dilation)]
    outputs = [
        FrozenConvolution(*map(tuple, options), groups)(x, weight, bias),
        PLAIN[x.ndim - 2](x, weight, bias, *options, groups),
    ]
    grad = torch.randn_like(outputs[1])
    return [(y.detach(), *torch.autograd.grad(y, leaves, grad)) for y in outputs]


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_output_and_gradients_are_the_plain_ones(data):
    dims = data.draw(st.integers(1, 3))
    several = st.lists(st.integers(1, 3), min_size=dims, max_size=dims)
    kernel, stride, dilation = data.draw(several), data.draw(several), data.draw(several)
    padding = data.draw(st.lists(st.integers(0, 3), min_size=dims, max_size=dims))
    groups = data.draw(st.sampled_from([1, 2, 4]))
    sizes = [data.draw(st.integers(d * (k - 1) + 1, d * (k - 1) + 6)) for k, d in zip(kernel, dilation, strict=True)]
    x = torch.randn(data.draw(st.integers(1, 2)), 4, *sizes, requires_grad=True)
    weight = torch.randn(8, 4 // groups, *kernel)
    bias = torch.randn(8, requires_grad=True) if data.draw(st.booleans()) else None
    (y, *grads), (reference, *expected) = both(x, weight, bias, stride, padding, dilation, groups)
    assert torch.equal(y, reference)
    for a, e in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions(dtype):
    x, bias = torch.randn(2, 4, 9, 9).to(dtype).requires_grad_(), torch.randn(8).to(dtype).requires_grad_()
    (y, *grads), (reference, *expected) = both(x, torch.randn(8, 4, 3, 3).to(dtype), bias, 2, 1, 1, 1)
    assert torch.equal(y, reference)
    for a, e in zip(grads, expected, strict=True):
        assert a.dtype is dtype
        torch.testing.assert_close(a, e, rtol=2e-2, atol=2e-2)


def test_depthwise_of_channels_last_images():
    x = torch.randn(2, 16, 7, 7).to(memory_format=torch.channels_last).requires_grad_()
    (y, grad), (reference, expected) = both(x, torch.randn(16, 1, 7, 7), None, 1, 3, 1, 16)
    assert torch.equal(y, reference)
    assert y.stride() == reference.stride()
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5)


def test_no_images():
    x = torch.randn(0, 4, 9, 9, requires_grad=True)
    (y, grad), (reference, expected) = both(x, torch.randn(8, 4, 3, 3), None, 2, 1, 1, 1)
    assert y.shape == reference.shape
    assert grad.shape == expected.shape


def test_nothing_is_kept_but_the_weight():
    x, weight = torch.randn(2, 4, 9, 9, requires_grad=True), torch.randn(8, 4, 3, 3)
    with Kept(weight) as kept:
        y = frozen_convolution(x, weight, torch.randn(8, requires_grad=True), [1, 1], [1, 1], [1, 1], 1)
    assert kept.nbytes == 0
    del y


def test_a_trained_bias_without_a_gradient_of_the_input():
    x, bias = torch.randn(2, 4, 9, 9), torch.randn(8, requires_grad=True)
    (_, grad), (_, expected) = both(x, torch.randn(8, 4, 3, 3), bias, 1, 0, 1, 1)
    torch.testing.assert_close(grad, expected)


def test_a_thawed_weight_is_trained():
    layer = FrozenConvolution((1, 1), (1, 1), (1, 1), 1)
    x, weight = torch.randn(2, 4, 5, 5, requires_grad=True), torch.randn(8, 4, 3, 3, requires_grad=True)
    torch.testing.assert_close(
        torch.autograd.grad(layer(x, weight).square().sum(), weight),
        torch.autograd.grad(F.conv2d(x, weight, padding=1).square().sum(), weight),
    )


def test_under_autocast():
    x, weight = torch.randn(2, 4, 9, 9, requires_grad=True), torch.randn(8, 4, 3, 3)
    bias = torch.randn(8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        (y, *grads), (reference, *expected) = both(x, weight, bias, 1, 1, 1, 1)
    assert y.dtype is reference.dtype is torch.bfloat16
    assert torch.equal(y, reference)
    for a, e in zip(grads, expected, strict=True):
        assert a.dtype is e.dtype is torch.float32
        torch.testing.assert_close(a, e, rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize(
    ("shape", "kernel"), [((2, 4, 9), (8, 4, 3)), ((2, 4, 9, 9), (8, 2, 3, 3)), ((1, 4, 5, 5, 5), (4, 1, 3, 3, 3))]
)
def test_opcheck(shape, kernel):
    dims = len(shape) - 2
    x, bias = torch.randn(shape, requires_grad=True), torch.randn(kernel[0], requires_grad=True)
    arguments = (x, torch.randn(kernel), bias, [2] * dims, [1] * dims, [1] * dims, 4 // kernel[1])
    assert set(opcheck(frozen_convolution, arguments).values()) == {"SUCCESS"}


def test_a_thawed_weight_is_trained_under_autocast():
    layer = FrozenConvolution((1, 1), (1, 1), (1, 1), 1)
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(2, 3, 8, 8), weight)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32
