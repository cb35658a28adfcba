"""Max pooling: forward and gradient to the last bit, ties and odd windows included; what is kept."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from s2a_fx import ops
from s2a_fx.codecs.packing import packed_width
from s2a_fx.nn.coded_norms import CodedMaxPool
from s2a_fx.ops import flat
from s2a_fx.ops.max_pool import bits_of

PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))


def gradients(pool, x):
    y = pool(x)
    torch.manual_seed(1)
    return y.detach(), torch.autograd.grad(y, x, torch.randn(y.shape).to(y.dtype))[0]


def assert_equals_torch_s(x, kernel, **options):
    y, grad = gradients(CodedMaxPool(kernel, **options), x)
    reference, exact = gradients(lambda x: F.max_pool2d(x, kernel, **options), x)
    assert torch.equal(y, reference)
    assert torch.equal(grad, exact)
    assert (y.stride(), grad.stride()) == (reference.stride(), exact.stride())


@settings(max_examples=80, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(7, 11), st.integers(7, 11)),
    PAIRS, PAIRS, PAIRS, st.booleans(), st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]), st.data(),
)  # fmt: skip
def test_equals_torch_s(shape, kernel, stride, dilation, ceil_mode, channels_last, dtype, data):
    padding = tuple(data.draw(st.integers(0, k // 2)) for k in kernel)
    x = torch.randint(-3, 3, shape).to(dtype)  # few values: ties everywhere
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "ceil_mode": ceil_mode}
    assert_equals_torch_s(x.requires_grad_(), kernel, **options)


def test_stem_of_a_resnet_and_padding_wider_than_the_image():
    assert_equals_torch_s(torch.randn(2, 8, 16, 16, requires_grad=True), 3, stride=2, padding=1)
    assert_equals_torch_s(torch.randn(2, 3, 2, 1, requires_grad=True), (5, 4), stride=1, padding=2)
    assert_equals_torch_s(torch.full((1, 2, 6, 6), -torch.inf, requires_grad=True), 3, stride=2, padding=1)


def test_largest_window():
    assert_equals_torch_s(torch.randn(1, 2, 33, 40, requires_grad=True), 16, stride=5, padding=3)


@pytest.mark.parametrize(("kernel", "bits"), [((1, 1), 1), ((2, 1), 1), ((2, 2), 2), ((3, 3), 4), ((5, 5), 5), ((16, 16), 8)])
def test_bits_tell_the_places_apart(kernel, bits):
    assert bits_of(list(kernel)) == bits


def test_a_place_takes_four_bits_where_torch_keeps_input_and_index():
    x = torch.randn(2, 8, 16, 16, requires_grad=True)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        y = CodedMaxPool(3, 2, 1)(x)
    rows, width = flat.row_count(y.numel())
    assert sizes == [rows * packed_width(width, 4)] == [y.numel() // 2]


def opcheck_cases():
    x = torch.randn(2, 3, 9, 8, requires_grad=True)
    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    return [(x, [3, 3], [2, 2], [1, 1], [1, 1], False), (last, [2, 3], [2, 1], [0, 1], [1, 2], True)]


@pytest.mark.parametrize("arguments", opcheck_cases())
def test_opcheck(arguments):
    assert set(opcheck(ops.max_pool, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("arguments", opcheck_cases())
def test_kernel_table_holds_the_op_s_own_lines(arguments):
    for a, b in zip(ops.KERNELS[ops.max_pool._opoverload](*arguments), ops.max_pool(*arguments), strict=True):
        assert torch.equal(a, b)


def test_gradcheck():
    x = torch.randperm(2 * 2 * 5 * 5).double().view(2, 2, 5, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.max_pool(x, [3, 3], [2, 2], [1, 1], [1, 1], False)[0], (x,))
