"""Batch norm: the forward and the running statistics to the last bit, the gradient that of torch's kernel on the decoded input."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.library import opcheck

from s2a_fx import ops
from s2a_fx.codecs.rows import Rows
from s2a_fx.nn.coded_norms import CodedBatchNorm
from s2a_fx.ops import flat

SHAPES = {nn.BatchNorm1d: [(4, 8), (3, 5, 7)], nn.BatchNorm2d: [(2, 8, 4, 4), (3, 5, 7, 3)], nn.BatchNorm3d: [(2, 3, 4, 5, 2)]}
CASES = [(kind, shape) for kind, shapes in SHAPES.items() for shape in shapes]


def norm_and_input(kind=nn.BatchNorm2d, shape=(3, 5, 7, 3), dtype=torch.float32, **options):
    torch.manual_seed(0)
    norm = kind(shape[1], **options)
    for tensor in [*norm.parameters(), *(b for b in norm.buffers() if b.is_floating_point())]:
        nn.init.uniform_(tensor, 0.5, 1.5)
    return norm, (2 * torch.randn(shape) + 1).to(dtype).requires_grad_()


def step(norm, x, grad=None):
    """Output, and gradients of x, weight and bias where they need one."""
    y = norm(x)
    torch.manual_seed(1)
    wanted = [t for t in (x, *norm.parameters()) if t.requires_grad]
    return y.detach(), torch.autograd.grad(y, wanted, torch.randn_like(y) if grad is None else grad)


def decoded(x):
    """x as the backward sees it."""
    coded = Rows(8).encode(flat.rows(x.detach(), 64))
    return flat.restore(Rows(8).decode(coded), x.shape, flat.is_channels_last(x)).to(x.dtype)


def assert_same_buffers(a, b):
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, buffer in a.named_buffers():
        assert torch.equal(buffer, b.get_buffer(name)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_forward_and_running_statistics_are_torch_s(kind, shape, dtype):
    norm, x = norm_and_input(kind, shape, dtype)
    coded = CodedBatchNorm.of(copy.deepcopy(norm))
    assert isinstance(coded, kind)
    for _ in range(2):
        assert torch.equal(coded(x), norm(x))
        assert_same_buffers(norm, coded)
    assert norm.num_batches_tracked == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "shape", "channels_last"), [(*c, False) for c in CASES] + [(*c, True) for c in CASES if len(c[1]) == 4]
)
def test_gradient_is_torch_s_on_the_decoded_input(kind, shape, channels_last, dtype):
    norm, x = norm_and_input(kind, shape, dtype)
    if channels_last:
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    actual = step(CodedBatchNorm.of(copy.deepcopy(norm)), x)[1]
    exact = step(norm, x)[1]
    mean, var = x.detach().float().mean((0, *range(2, x.ndim))), x.detach().float().var((0, *range(2, x.ndim)), correction=0)
    torch.manual_seed(1)
    grad = torch.randn_like(x)
    expected = torch.ops.aten.native_batch_norm_backward(
        grad, decoded(x), norm.weight, None, None, mean, (var + norm.eps).rsqrt(), True, norm.eps, [True] * 3
    )
    for a, e, plain in zip(actual, expected, exact, strict=True):
        assert (a.dtype, a.shape) == (plain.dtype, plain.shape)
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype is torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(a, e, **tolerance)
        assert F.cosine_similarity(a.float().flatten(), plain.float().flatten(), 0) > 0.999


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"momentum": 0.5}])
def test_options(options):
    norm, x = norm_and_input(**options)
    coded = CodedBatchNorm.of(copy.deepcopy(norm))
    for _ in range(3):
        (y, grads), (reference, exact) = step(coded, x), step(norm, x)
        assert torch.equal(y, reference)
        assert_same_buffers(norm, coded)
        for a, e in zip(grads, exact, strict=True):
            torch.testing.assert_close(a, e, rtol=0.05, atol=0.02)
    assert torch.equal(coded.eval()(x), norm.eval()(x))


@pytest.mark.parametrize("kind", ["frozen", "trained"])
def test_frozen_statistics_are_exact_but_for_the_weight(kind):
    norm, x = norm_and_input()
    norm.eval().weight.requires_grad_(kind == "trained")
    coded = CodedBatchNorm.of(copy.deepcopy(norm))
    before = copy.deepcopy(coded.state_dict())
    y, (grad_x, *grad_weight, grad_bias) = step(coded, x)
    reference, (exact_x, *exact_weight, exact_bias) = step(norm, x)
    assert torch.equal(y, reference)
    assert torch.equal(grad_x, exact_x)
    torch.testing.assert_close(grad_bias, exact_bias)
    for a, e in zip(grad_weight, exact_weight, strict=True):
        torch.testing.assert_close(a, e, rtol=0.02, atol=0.05)
    assert all(torch.equal(before[name], value) for name, value in coded.state_dict().items())


def kept(norm, x):
    """Elements kept of what is as large as x, and of what is not, parameters and buffers left out."""
    sizes = []
    own = {t.data_ptr() for t in [*norm.parameters(), *norm.buffers()]}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(0 if t.data_ptr() in own else t.nbytes) or t, lambda t: t):
        norm(x)
    return sum(sizes)


def test_what_is_kept():
    norm, x = norm_and_input(shape=(4, 8, 4, 4))
    coded = CodedBatchNorm.of(norm)
    codes = Rows(8).nbytes(x.numel() // 64, 64)
    assert codes == 512 * 68 // 64
    assert kept(coded, x) == codes + 2 * 8 * 4
    assert kept(coded, x.detach()) == codes + 2 * 8 * 4  # for the weight
    coded.weight.requires_grad_(False)
    assert kept(coded, x) == codes + 2 * 8 * 4
    assert kept(coded, x.detach()) == 0
    coded.eval()
    assert kept(coded, x) == 0
    coded.weight.requires_grad_(True)
    assert kept(coded, x) == codes


def test_bias_alone_is_exact():
    norm, x = norm_and_input()
    norm.weight.requires_grad_(False)
    (actual,) = step(CodedBatchNorm.of(copy.deepcopy(norm)), x.detach())[1]
    torch.testing.assert_close(actual, step(norm, x.detach())[1][0])


def test_one_value_a_channel_is_refused_in_torch_s_words():
    norm, x = norm_and_input(shape=(1, 4, 1, 1))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        CodedBatchNorm.of(norm)(x)


def test_nothing_is_coded_without_gradient():
    norm, x = norm_and_input()
    coded = CodedBatchNorm.of(norm)
    with torch.no_grad():
        assert coded(x).grad_fn is None
    assert coded(x).grad_fn is not None


@pytest.mark.parametrize("training", [True, False])
def test_gradcheck_where_the_gradient_is_exact(training):
    x, weight, bias = (torch.randn(*s, dtype=torch.float64) for s in ((3, 2, 2, 2), (2,), (2,)))
    mean, var = torch.randn(2, dtype=torch.float64), torch.rand(2, dtype=torch.float64) + 0.5
    if training:
        inputs = (bias.requires_grad_(),)
        assert torch.autograd.gradcheck(lambda b: ops.batch_norm(x, weight, b, None, None, 0.1, 1e-5, 0)[0], inputs)
    else:
        inputs = (x.requires_grad_(), bias.requires_grad_())
        assert torch.autograd.gradcheck(lambda x, b: ops.frozen_batch_norm(x, weight, b, mean, var, 1e-5, 0)[0], inputs)


def opcheck_cases():
    x = torch.randn(3, 8, 4, 5, requires_grad=True)
    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias = torch.rand(8, requires_grad=True), torch.rand(8, requires_grad=True)
    frozen, mean, var = torch.rand(8), torch.randn(8), torch.rand(8)
    return [
        (ops.batch_norm, (x, weight, bias, mean, var, 0.1, 1e-5, 8)),
        (ops.batch_norm, (last, frozen, bias, None, None, 0.1, 1e-5, 4)),
        (ops.batch_norm, (x.detach(), frozen, bias, mean, var, 0.1, 1e-5, 0)),
        (ops.frozen_batch_norm, (x, frozen, bias, mean, var, 1e-5, 0)),
        (ops.frozen_batch_norm, (last, weight, bias, mean, var, 1e-5, 8)),
    ]


@pytest.mark.parametrize(("op", "arguments"), opcheck_cases())
def test_opcheck(op, arguments):
    assert set(opcheck(op, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize(("op", "arguments"), opcheck_cases())
def test_kernel_table_holds_the_op_s_own_lines(op, arguments):
    for a, b in zip(ops.KERNELS[op._opoverload](*arguments), op(*arguments), strict=True):
        assert torch.equal(a, b)
