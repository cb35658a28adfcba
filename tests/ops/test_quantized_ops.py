"""Each op: the forward to the last bit, the gradient against the paper's formula, and PyTorch's own checks."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from s2a_fx import ops
from s2a_fx.ops.bits import BITS, look_up, pack, packed_size

SHAPES = st.lists(st.integers(0, 7), min_size=1, max_size=4).map(tuple)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def uniform(x, bits):
    """Equations (8) and (9), in one line each."""
    if x.numel() == 0:
        return x
    step = ((x.max() - x.min()) / (2**bits - 1)).clamp_min(torch.finfo(x.dtype).tiny)
    return ((x - x.min()) / step).round() * step + x.min()


def noncontiguous(shape, dtype):
    return (2 * torch.randn(*shape, 2)).to(dtype)[..., 0].detach().requires_grad_()


def gelu_slope(x, bits):
    x = uniform(x.float().clamp(-2, 2), bits)
    return torch.sigmoid(1.702 * x) + 0.22 * torch.sin(1.5 * x)  # (12)


def silu_slope(x, bits):
    x = uniform((x.float() / 1.702).clamp(-2, 2), bits)
    return torch.sigmoid(1.702 * x) + 0.22 * torch.sin(1.5 * x)


@settings(max_examples=60, deadline=None)
@given(SHAPES, DTYPES, st.sampled_from(BITS), st.sampled_from(["none", "tanh"]))
def test_gelu(shape, dtype, bits, approximate):
    x = noncontiguous(shape, dtype)
    y = ops.gelu(x, approximate, bits)[0]
    assert torch.equal(y, F.gelu(x, approximate=approximate))
    grad = torch.randn_like(y)
    (actual,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(actual, (grad * gelu_slope(x, bits)).to(dtype))


@settings(max_examples=60, deadline=None)
@given(SHAPES, DTYPES, st.sampled_from(BITS))
def test_silu(shape, dtype, bits):
    x = noncontiguous(shape, dtype)
    y = ops.silu(x, bits)[0]
    assert torch.equal(y, F.silu(x))
    grad = torch.randn_like(y)
    (actual,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(actual, (grad * silu_slope(x, bits)).to(dtype))


@settings(max_examples=60, deadline=None)
@given(SHAPES, DTYPES)
def test_relu_is_exact(shape, dtype):
    x = noncontiguous(shape, dtype)
    y, reference = ops.relu(x)[0], F.relu(x)
    assert torch.equal(y, reference)
    grad = torch.randn_like(y)
    assert torch.equal(torch.autograd.grad(y, x, grad)[0], torch.autograd.grad(reference, x, grad)[0])


@settings(max_examples=60, deadline=None)
@given(SHAPES, DTYPES, st.sampled_from(BITS), st.data())
def test_softmax(shape, dtype, bits, data):
    x = noncontiguous(shape, dtype)
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    y = ops.softmax(x, dim, bits)[0]
    assert torch.equal(y, torch.softmax(x, dim))
    grad = torch.randn_like(y)
    (actual,) = torch.autograd.grad(y, x, grad)
    coded = uniform(y.detach().float(), bits)
    expected = coded * (grad.float() - (coded * grad.float()).sum(dim, keepdim=True))  # (7)
    torch.testing.assert_close(actual, expected.to(dtype))


def attention_reference(q, k, v, mask, scale, bits, grad, noise=None):
    """Gradients of the attention through the dequantized map, equation (7)."""
    scores = q @ k.transpose(-2, -1) * scale + (0 if mask is None else mask)
    y = uniform(torch.softmax(scores, -1), bits)
    noise = torch.ones_like(y) if noise is None else noise
    dropped = y * noise
    grad_map = grad @ v.transpose(-2, -1) * noise
    grad_scores = y * (grad_map - (y * grad_map).sum(-1, keepdim=True))
    return grad_scores @ k * scale, grad_scores.transpose(-2, -1) @ q * scale, dropped.transpose(-2, -1) @ grad, grad_scores


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_attention(batch, masked, bits):
    q, k, v = (torch.randn(batch, 2, n, 8, requires_grad=True) for n in (5, 7, 7))
    mask = torch.randn(1, 2, 5, 7, requires_grad=True) if masked else None
    y = ops.attention(q, k, v, mask, 0.0, False, 0.3, bits)[0]
    assert torch.equal(y, F.scaled_dot_product_attention(q, k, v, mask, scale=0.3))
    grad = torch.randn_like(y)
    inputs = (q, k, v, mask) if masked else (q, k, v)
    actual = torch.autograd.grad(y, inputs, grad)
    with torch.no_grad():
        *expected, grad_mask = attention_reference(q, k, v, mask, 0.3, bits, grad)
    for a, e in zip(actual, [*expected, grad_mask.sum(0, keepdim=True)], strict=False):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_attention_draws_the_dropout_of_the_plain_one(dropout_p):
    q, k, v = (torch.randn(2, 2, 6, 8, requires_grad=True) for _ in range(3))
    torch.manual_seed(5)
    y = ops.attention(q, k, v, None, dropout_p, False, 8**-0.5, 8)[0]
    torch.manual_seed(5)
    reference = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)
    assert torch.equal(y, reference)
    grad = torch.randn_like(y)
    for a, e in zip(torch.autograd.grad(y, (q, k, v), grad), torch.autograd.grad(reference, (q, k, v), grad), strict=True):
        assert F.cosine_similarity(a.flatten(), e.flatten(), 0) > 0.999


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_softmax_matmul_equals_softmax_dropout_product(dropout_p, dtype):
    scores = torch.randn(2, 3, 5, 7, dtype=dtype, requires_grad=True)
    value = torch.randn(2, 3, 7, 4, dtype=dtype, requires_grad=True)
    torch.manual_seed(5)
    y = ops.softmax_matmul(scores, value, dropout_p, 8)[0]
    torch.manual_seed(5)
    reference = F.dropout(torch.softmax(scores, -1), dropout_p) @ value
    assert torch.equal(y, reference)
    grad = torch.randn_like(y)
    for a, e in zip(
        torch.autograd.grad(y, (scores, value), grad), torch.autograd.grad(reference, (scores, value), grad), strict=True
    ):
        assert F.cosine_similarity(a.flatten().float(), e.flatten().float(), 0) > 0.999


def test_what_is_dropped_whole_has_a_gradient_of_zero():
    q, k, v = (torch.randn(2, 2, 6, 6, requires_grad=True) for _ in range(3))
    for y in (
        ops.attention(q, k, v, None, 1.0, False, 0.5, 4)[0],
        ops.softmax_matmul(q @ k, v, 1.0, 4)[0],
        ops.dropout(q + k + v, 1.0)[0],
    ):
        assert not y.any()
        assert not any(g.any() for g in torch.autograd.grad(y.sum(), (q, k, v)))


def opcheck_cases():
    def leaf(*shape):
        return torch.randn(*shape, requires_grad=True)

    q, k, v = leaf(2, 2, 5, 4), leaf(2, 2, 7, 4), leaf(2, 2, 7, 4)
    return [
        (ops.gelu, (leaf(3, 5), "none", 4)),
        (ops.silu, (leaf(3, 5), 2)),
        (ops.relu, (leaf(3, 5),)),
        (ops.softmax, (leaf(3, 5), -1, 4)),
        (ops.softmax_matmul, (leaf(2, 5, 7), leaf(2, 7, 3), 0.0, 4)),
        (ops.attention, (q, k, v, None, 0.0, False, 0.5, 4)),
        (ops.attention, (q, k, v, leaf(1, 1, 5, 7), 0.0, False, 0.5, 8)),
    ]


@pytest.mark.parametrize(("op", "arguments"), opcheck_cases())
def test_opcheck(op, arguments):
    assert set(opcheck(op, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize(("op", "arguments"), opcheck_cases())
def test_kernel_table_holds_the_op_s_own_lines(op, arguments):
    kernel = ops.KERNELS[op._opoverload]
    for a, b in zip(kernel(*arguments), op(*arguments), strict=True):
        assert torch.equal(a, b)


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.sampled_from(BITS))
def test_codes_are_really_packed_and_come_back(shape, bits):
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.numel() == packed_size(codes.numel(), bits) == -(-codes.numel() * bits // 8)
    assert torch.equal(look_up(packed, torch.arange(2**bits), bits, codes.shape), codes.long())


def test_a_constant_tensor_is_coded_without_a_range():
    x = torch.full((4, 4), 0.5, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.gelu(x, "none", 4)[0].sum(), x)
    torch.testing.assert_close(grad, gelu_slope(x.detach(), 4))
