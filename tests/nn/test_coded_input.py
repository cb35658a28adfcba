"""Coded inputs: any part of a model, recomputed from the codes of what it reads."""

import copy
import dataclasses
import pickle

import pytest
import torch
import torch.nn.functional as F
from saved_bytes import Kept, cosine
from small_models import small_model
from steps import Twice, assert_near, assert_same, layers, step, worst_cosine
from timm.models.xcit import PositionalEncodingFourier
from torch import nn

import s2a_fx
from s2a_fx.codecs.rows import Rows
from s2a_fx.nn import recompute
from s2a_fx.nn.coded_input import WHOLE, Parts
from s2a_fx.ops import flat
from s2a_fx.passes import CompressActivations, FuseAttention


class Product(nn.Module):
    """Two activations multiplied, a trained convolution, a product of matrices, a softmax: none has an operator of its own."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.gate = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.key = nn.Linear(64, 64)
        self.head = nn.Linear(64, 5)

    def forward(self, x):
        x = self.stem(x)
        x = x * self.gate(x)
        x = x.flatten(2)
        return self.head(torch.softmax(self.key(x) @ x.mT / 8, -1) @ x).mean(1)


class Drawn(nn.Module):
    """`function` between two layers; it draws."""

    def __init__(self, function):
        super().__init__()
        self.a = nn.Linear(64, 64)
        self.function = function
        self.b = nn.Linear(64, 5)

    def forward(self, x):
        return self.b(self.function(self.a(x.flatten(2)))).mean(1)


class Attention(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5 if self.training else 0.0)


class AttentionByPosition(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x, None, 0.5)


class FeatureDropout(nn.Module):
    def forward(self, x):
        return F.feature_alpha_dropout(x, 0.5, self.training)


DRAWING = {
    "nn.Dropout": lambda: nn.Dropout(0.5),
    "nn.AlphaDropout": lambda: nn.AlphaDropout(0.5),
    "a function's dropout": FeatureDropout,
    "attention dropout": Attention,
    "attention dropout by position": AttentionByPosition,
}
IMAGES = (4, 3, 8, 8)


def coded(model, x, bits=8):
    options = {field.name: bits for field in dataclasses.fields(CompressActivations) if field.name.endswith("bits")}
    gm = s2a_fx.transform(model, x, (CompressActivations(**options, smallest=1),))
    assert layers(gm, "CodedInput")
    return gm


def network(images=IMAGES):
    torch.manual_seed(0)
    return Product(), torch.randn(images)


def drawing(case):
    torch.manual_seed(0)
    return Drawn(DRAWING[case]()), torch.randn(4, 8, 8, 8)


@pytest.mark.parametrize("family", ["vit", "convnext"])
def test_forward_is_equal_and_gradients_are_near_at_8_bits(family):
    model, x = small_model(family)
    assert_near(coded(model, x), model, x)


def test_any_operator():
    model, x = network()
    assert_near(coded(model, x), model, x)


def test_gradients_get_nearer_with_every_bit():
    model, x = network()
    exact = step(model, x)[1]
    worst = [worst_cosine(step(coded(model, x, bits), x)[1], exact)[0] for bits in (2, 4, 6, 8)]
    assert worst == sorted(worst)


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_bytes_kept_are_the_codec_s(bits):
    model = nn.Sequential(nn.Conv2d(8, 8, 3))
    x = torch.randn(2, 8, 9, 9, requires_grad=True)
    gm = coded(model, x, bits)
    with Kept(*gm.parameters()) as kept:
        y = gm(x)
    rows = flat.groups(x, 64).shape[0]
    assert kept.nbytes == Rows(bits).nbytes(rows, 64)
    del y


@pytest.mark.parametrize("case", DRAWING)
def test_what_is_drawn_inside_is_drawn_again(case):
    model, x = drawing(case)
    assert_near(coded(model, x), model, x)


@pytest.mark.parametrize(("rate", "fused"), [("attn_drop_rate", True), ("attn_drop_rate", False), ("drop_path_rate", True)])
def test_timm_s_own_dropout_is_drawn_again(rate, fused):
    model, x = small_model("vit", **{rate: 0.5})
    for block in model.blocks:
        block.attn.fused_attn = fused
    assert_near(coded(model, x), model, x)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_compute_the_same_and_share_nothing(copied):
    model, x = network()
    gm = coded(model, x)
    other = copied(gm)
    assert_same(other, gm, x)
    output, grads = step(gm, x)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1)
    assert torch.equal(step(gm, x)[0], output)
    assert all(torch.equal(g, grads[n]) for n, g in step(gm, x)[1].items())
    assert not torch.equal(step(other, x)[0], output)


def test_weights_moved_to_another_dtype_follow():
    model, x = network()
    gm = coded(model, x).to(torch.float64)
    output, actual = step(gm, x.double())
    y, exact = step(model.double(), x.double())
    assert torch.equal(output, y)
    assert {g.dtype for g in actual.values()} == {torch.float64}
    assert worst_cosine(actual, exact) > (0.999,)


def test_backward_twice():
    model, x = network()
    gm = coded(model, x)
    loss = gm(x).square().sum()
    loss.backward(retain_graph=True)
    once = {n: p.grad.clone() for n, p in gm.named_parameters()}
    loss.backward()
    for n, p in gm.named_parameters():
        torch.testing.assert_close(p.grad, 2 * once[n])


def test_a_second_derivative_is_refused_or_right():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Softmax(-1), nn.Linear(64, 8)), torch.randn(4, 64)

    def penalty(module):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(module(leaf).square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), leaf)[0]

    gm = coded(model, x)
    try:
        actual = penalty(gm)
    except RuntimeError:
        return
    assert cosine(actual, penalty(model)) > 0.999


def test_without_gradients_it_is_the_plain_module():
    model, x = network()
    gm = coded(model, x)
    for train in (True, False):
        with torch.no_grad(), Kept() as kept:
            assert torch.equal(gm.train(train)(x), model.train(train)(x))
        assert kept.nbytes == 0


def test_under_autocast():
    model, x = network()
    gm = coded(model, x)
    results = []
    for module in (model, gm):
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        module.zero_grad()
        (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        results.append((y.detach(), torch.cat([p.grad.flatten() for p in module.parameters()])))
    assert results[1][0].dtype is results[0][0].dtype
    assert torch.equal(results[1][0], results[0][0])
    assert cosine(results[1][1], results[0][1]) > 0.98


def test_a_step_of_the_grad_scaler():
    model, x = network()
    gm = coded(model, x)
    before = gm.get_parameter("gate.weight").detach().clone()
    optimizer, scaler = torch.optim.SGD(gm.parameters(), 0.1), torch.amp.GradScaler("cpu")
    exact = step(model, x)[1]["gate.weight"]
    y = gm(x)
    scaler.scale((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert cosine(before - gm.get_parameter("gate.weight"), exact) > 0.999


@pytest.mark.parametrize("images", [(4, 6, 8, 8), (0, 3, 8, 8), (1, 3, 8, 8)])
def test_channels_last_and_other_batches(images):
    model, x = network()
    gm = coded(model, x)
    x = torch.randn(images)[:, :3].to(memory_format=torch.channels_last)
    y, exact = step(model, x)
    output, actual = step(gm, x)
    torch.testing.assert_close(output, y)
    assert worst_cosine(actual, exact) > (0.999,) if len(x) else actual.keys() == exact.keys()


def test_called_twice_in_one_forward():
    model, x = drawing("nn.AlphaDropout")
    gm = coded(model, x)

    assert_near(Twice(gm), Twice(model), x)


def test_a_batch_norm_s_statistics_move_once():
    class Functional(nn.Module):
        """A batch norm that no module type betrays."""

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.register_buffer("mean", torch.zeros(8))
            self.register_buffer("variance", torch.ones(8))

        def forward(self, x):
            return F.batch_norm(self.conv(x), self.mean, self.variance, training=True)

    model, x = Functional(), torch.randn(4, 3, 16, 16)
    gm = copy.deepcopy(coded(model, x))
    model.load_state_dict(gm.state_dict())
    step(model, x)
    step(gm, x)
    for name in ("mean", "variance"):
        torch.testing.assert_close(gm.get_buffer(name), model.get_buffer(name))


class SelfAttention(nn.Module):
    """Queries, keys and values of one tensor, far from 0."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x):
        x = self.linear(x) + 3
        return F.scaled_dot_product_attention(x, x, x)


def test_queries_are_not_centered_where_they_are_keys_too():
    torch.manual_seed(0)
    model, x = SelfAttention(), torch.randn(2, 3, 8, 64)
    _, exact = step(model, x)
    assert worst_cosine(step(coded(model, x), x)[1], exact) > (0.999,)


def grouped(few_keys):
    """Attention whose keys are fewer than its queries, and code in no whole rows an image."""

    def attend(x):
        return F.scaled_dot_product_attention(x, x[..., :few_keys, :], x[..., :few_keys, :])

    return attend


@pytest.mark.parametrize("shape", [(5, 2, 8, 64), (6, 2, 16, 8), (40, 64)], ids=str)
@pytest.mark.parametrize("keys", [0, 3])
@pytest.mark.parametrize("images", [1, 2, 4])
@pytest.mark.parametrize("forward", [False, True])
def test_an_attention_a_few_images_at_a_time_has_the_same_gradients(shape, keys, images, forward):
    torch.manual_seed(0)
    width = shape[-1]
    attend = grouped(keys) if keys else F.scaled_dot_product_attention

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(width, width), nn.Linear(width, width)

        def forward(self, x):
            return attend(self.q(x)) if keys else attend(self.q(x), self.k(x), x)

    model, x = Model(), torch.randn(shape)
    gm = coded(model, x, 4)
    (module,) = [m for m in layers(gm, "CodedInput") if "scaled_dot_product" in m.body.code]
    module.parts = WHOLE
    y, whole = step(gm, x)
    module.parts = Parts(images, forward=forward)
    output, actual = step(gm, x)
    torch.testing.assert_close(output, y)
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, whole[name])


def test_an_attention_with_dropout_is_recomputed_at_once():
    gm = coded(*small_model("vit", attn_drop_rate=0.5))
    assert not any(m.parts.images for m in layers(gm, "CodedInput"))


class Positioned(nn.Module):
    """A trained layer of positions, a leaf that takes sizes alone."""

    def __init__(self):
        super().__init__()
        self.positions, self.head = PositionalEncodingFourier(hidden_dim=8, dim=8), nn.Linear(8, 5)

    def forward(self, x):
        return self.head((x + self.positions(x.shape[0], x.shape[2], x.shape[3])).mean((2, 3)))


def test_what_takes_numbers_alone():
    torch.manual_seed(0)
    model, x = Positioned(), torch.randn(2, 8, 16, 16)
    gm = coded(model, x)
    assert any(not m.activations for m in layers(gm, "CodedInput"))
    assert_near(gm, model, x)


class Windows(nn.Module):
    """Attention over shifted windows: a bias for each head, a mask for each window of an image."""

    def __init__(self, windows=3, minor=True):
        super().__init__()
        self.qkv, self.windows, self.minor = nn.Linear(16, 48), windows, minor
        self.register_buffer("bias", torch.randn(1, 2, 8, 8))
        self.register_buffer("mask", torch.randn(1, windows, 1, 8, 8) if minor else torch.randn(windows, 1, 1, 8, 8))

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * 0.3) @ k.transpose(-2, -1) + self.bias
        places = (-1, self.windows) if self.minor else (self.windows, -1)
        scores = (scores.view(*places, 2, 8, 8) + self.mask).view(-1, 2, 8, 8)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("part_bytes", [1, 100_000])
def test_windows_of_an_image_go_together(part_bytes, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(recompute, "PART_BYTES", part_bytes)
    model, x = Windows(), torch.randn(15, 8, 16)
    gm = s2a_fx.transform(model, x, (FuseAttention(), CompressActivations(attention_bits=8, smallest=1)))
    (module,) = [m for m in layers(gm, "CodedInput") if m.parts.images]
    assert module.parts.together == 3 and module.parts.forward
    y, exact = step(model, x)
    output, actual = step(gm, x)
    torch.testing.assert_close(output, y)
    assert worst_cosine(actual, exact) > (0.999,)
    assert torch.equal(gm(x[:6]), gm(x)[:6])


def test_windows_that_lie_apart_go_at_once():
    gm = s2a_fx.transform(Windows(minor=False), torch.randn(15, 8, 16), (FuseAttention(), CompressActivations(smallest=1)))
    assert not any(m.parts.images for m in layers(gm, "CodedInput"))
