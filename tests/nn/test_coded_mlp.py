"""Two frozen linear layers around an activation: forward, gradients, what is kept, a part at a time, and what is left alone."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from saved_bytes import Kept, cosine
from slow import fast
from steps import assert_near, assert_same, layers, step, worst_cosine
from torch import nn

import s2a_fx
from s2a_fx.codecs.bins import best_bins
from s2a_fx.nn import recompute
from s2a_fx.nn.coded_mlp import CodedMLP
from s2a_fx.ops.activation import BINNED
from s2a_fx.passes import CompressActivations, FreezeWeights

X = (6, 5, 16)


def mlp(activation=None, drop=0.0, bias=True):
    torch.manual_seed(0)
    middle = [activation or nn.GELU(), nn.Dropout(drop), nn.Identity()]
    return nn.Sequential(nn.Linear(16, 32, bias=bias), *middle, nn.Linear(32, 8, bias=bias)), torch.randn(X)


def coded(model, x, bits=8, keep=("bias",)):
    return s2a_fx.transform(model, x, (FreezeWeights(keep=keep), CompressActivations(bits, smallest=1)))


@pytest.fixture(params=[None, 1, 32 * 8 * 7], ids=["whole", "a row at a time", "uneven parts"])
def parts(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(recompute, "PART_BYTES", request.param)


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu", "quick_gelu", "mish"])
def test_gradients_are_those_of_the_binned_derivative(name, parts):
    torch.manual_seed(0)
    x = torch.randn(X, dtype=torch.float64, requires_grad=True)
    parameters = [torch.randn(s, dtype=torch.float64) / 4 for s in ((32, 16), (32,), (8, 32), (8,))]
    for bias in parameters[1::2]:
        bias.requires_grad_()
    grad = torch.randn(6, 5, 8, dtype=torch.float64)
    y = CodedMLP(name, 4)(x, *parameters)
    found = torch.autograd.grad(y, (x, *parameters[1::2]), grad)
    u = F.linear(x, *parameters[:2])
    torch.testing.assert_close(y, F.linear(BINNED[name](u), *parameters[2:]))
    bins = best_bins(BINNED[name], 4)
    slopes = torch.tensor(bins.levels, dtype=torch.float64)[torch.bucketize(u.float(), torch.tensor(bins.boundaries), right=True)]
    g = grad @ parameters[2] * slopes
    for actual, expected in zip(found, (g @ parameters[0], g.sum((0, 1)), grad.sum((0, 1))), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)  # slopes are float32


@pytest.mark.parametrize("bits", fast([2, 4, 8], 2, 4))
def test_keeps_its_codes_alone(bits, parts):
    model, x = mlp()
    gm = coded(model, x.requires_grad_(), bits)
    assert len(layers(gm, "CodedMLP")) == 1
    with Kept(*gm.parameters()) as kept:
        y = gm(x)
    assert kept.nbytes == 6 * 5 * 32 * bits // 8 == s2a_fx.analyze(gm, x).saved_bytes
    del y


@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_equal_and_gradients_are_near(bias, parts):
    model, x = mlp(bias=bias)
    y, exact = step(s2a_fx.transform(model, x, (FreezeWeights(keep=("bias",)),)), x)
    output, actual = step(coded(model, x), x)
    torch.testing.assert_close(output, y)
    assert worst_cosine(actual, exact) > (0.999,)


def test_needs_no_gradient_of_its_input(parts):
    model, x = mlp()
    gm, exact = coded(model, x), s2a_fx.transform(model, x, (FreezeWeights(keep=("bias",)),))
    for m in (gm, exact):
        m(x).square().sum().backward()
    for name in ("0.bias", "4.bias"):
        torch.testing.assert_close(gm.get_parameter(name).grad, exact.get_parameter(name).grad, rtol=0.02, atol=0.05)


def test_where_the_last_bias_alone_trains_nothing_is_kept():
    model, x = mlp()
    gm = coded(model, x)
    gm.get_parameter("0.bias").requires_grad_(False)
    with Kept(*gm.parameters()) as kept:
        gm(x).sum().backward()
    assert kept.nbytes == 0
    assert gm.get_parameter("4.bias").grad is not None


def test_thawed_weights_train():
    model, x = mlp()
    gm = coded(model, x)
    gm.requires_grad_()
    assert_near(gm, model, x, 0.99999)


def test_without_gradients_it_is_the_plain_function():
    model, x = mlp()
    with torch.no_grad():
        assert torch.equal(coded(model, x)(x), model(x))


def test_under_autocast_gradients_are_near(parts):
    model, x = mlp()
    gm = coded(model, x)
    _, exact = step(gm, x)
    with torch.autocast("cpu", torch.bfloat16):
        output = gm(x)
    assert output.dtype is torch.bfloat16
    gm.zero_grad()
    (output.float() * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    actual = {n: p.grad for n, p in gm.named_parameters() if p.grad is not None}
    assert {g.dtype for g in actual.values()} == {torch.float32}
    assert worst_cosine(actual, {n: g for n, g in exact.items() if n in actual}) > (0.99,)


def test_an_empty_batch():
    model, x = mlp()
    gm = coded(model, x)
    y = gm(x[:0])
    y.sum().backward()
    assert y.shape == (0, 5, 8)
    assert not gm.get_parameter("0.bias").grad.any()


@pytest.mark.parametrize("shape", [(16,), (7, 16), (2, 3, 4, 16)], ids=str)
def test_any_number_of_dimensions(shape, parts):
    model, _ = mlp()
    x = torch.randn(shape)
    _, exact = step(s2a_fx.transform(model, x, (FreezeWeights(keep=("bias",)),)), x)
    assert worst_cosine(step(coded(model, x), x)[1], exact) > (0.999,)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_compute_the_same(copied):
    model, x = mlp()
    gm = coded(model, x)
    assert_same(copied(gm), gm, x)


def test_names_in_the_state_dict_stay():
    model, x = mlp()
    assert coded(model, x).state_dict().keys() == model.state_dict().keys()


def test_a_second_derivative_is_refused():
    model, x = mlp()
    gm, x = coded(model, x), x.requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gm(x).square().sum(), x, create_graph=True)


def test_backward_twice():
    model, x = mlp()
    gm = coded(model, x)
    loss = gm(x).square().sum()
    loss.backward(retain_graph=True)
    once = gm.get_parameter("0.bias").grad.clone()
    loss.backward()
    torch.testing.assert_close(gm.get_parameter("0.bias").grad, 2 * once)


def test_weights_moved_to_another_dtype_follow(parts):
    model, x = mlp()
    gm = coded(model, x).to(torch.bfloat16)
    _, exact = step(s2a_fx.transform(model, x, (FreezeWeights(keep=("bias",)),)), x)
    actual = step(gm, x.bfloat16())[1]
    assert {g.dtype for g in actual.values()} == {torch.bfloat16}
    assert worst_cosine(actual, exact) > (0.99,)


def test_what_does_not_lie_in_order(parts):
    module, x = CodedMLP("gelu", 8), torch.randn(6, 16, 5).mT.requires_grad_()
    weights = [torch.randn(32, 16), None, torch.randn(8, 32), None]
    grad = torch.randn(1, 1, 8).expand(6, 5, 8)
    (actual,) = torch.autograd.grad(module(x, *weights), x, grad)
    (exact,) = torch.autograd.grad(F.gelu(x @ weights[0].T) @ weights[2].T, x, grad)
    assert cosine(actual, exact) > 0.9999


class Twice(nn.Module):
    """One MLP called twice; one after it reads what it overwrites."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        x = self.second(F.gelu(self.first(x)))
        u = self.first(x)
        return x.relu_() + self.second(F.gelu(u))


def test_called_twice_and_read_before_it_is_overwritten():
    torch.manual_seed(0)
    model, x = Twice(), torch.randn(X)
    gm = coded(model, x)
    assert len(layers(gm, "CodedMLP")) == 2
    y, exact = step(s2a_fx.transform(model, x, (FreezeWeights(keep=("bias",)),)), x)
    output, actual = step(gm, x)
    torch.testing.assert_close(output, y)
    assert worst_cosine(actual, exact) > (0.999,)


def test_layers_in_a_row():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 8)), torch.randn(X)
    gm = coded(model, x)
    assert [len(layers(gm, name)) for name in ("CodedMLP", "CodedActivation")] == [1, 1]
    _, exact = step(s2a_fx.transform(model, x, (FreezeWeights(keep=("bias",)),)), x)
    assert worst_cosine(step(gm, x)[1], exact) > (0.999,)


class ReadTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x):
        u = self.first(x)
        return self.second(F.gelu(u)) + u[..., :8]


def hooked(layer=0):
    model = mlp()[0]
    model[layer].register_forward_hook(lambda module, args, output: output * 2)
    return model


@pytest.mark.parametrize(
    ("model", "keep"),
    [
        (mlp()[0], ("bias", "4.*")),
        (mlp()[0], ("bias", "0.weight")),
        (mlp(nn.ReLU())[0], ("bias",)),
        (mlp(drop=0.5)[0], ("bias",)),
        (ReadTwice(), ("bias",)),
        (hooked(), ("bias",)),
        (hooked(1), ("bias",)),
        (hooked(3), ("bias",)),
        (nn.Sequential(nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 8)), ("bias",)),
    ],
    ids=[
        "second trains",
        "first trains",
        "relu",
        "dropout",
        "read twice",
        "hooked",
        "activation hooked",
        "identity hooked",
        "cannot be packed",
    ],
)
def test_what_does_not_fit_is_left_to_the_other_forms(model, keep):
    x = torch.randn(X)
    gm = coded(model, x, keep=keep)
    assert not layers(gm, "CodedMLP")
    assert_near(gm, s2a_fx.transform(model, x, (FreezeWeights(keep=keep),)), x)
