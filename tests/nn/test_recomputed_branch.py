"""Recomputed branches: the model's own forward, gradients near the exact ones, and ordinary modules in every other way."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from saved_bytes import Kept, cosine
from small_models import small_model
from steps import Twice, assert_near, assert_same, layers, step, worst_cosine
from torch import nn

import s2a_fx
from s2a_fx.passes import RecomputeBranches

BRANCHES = {"vit": 6, "swin": 10, "convnext": 5}
FAMILIES = list(BRANCHES)


class Residual(nn.Module):
    def __init__(self, body, width=32):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.body = body

    def forward(self, x):
        return x + self.body(self.norm(x))


class Mlp(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.a = nn.Linear(width, 4 * width)
        self.b = nn.Linear(4 * width, width)

    def activate(self, x):
        return F.gelu(x)

    def forward(self, x):
        return self.b(self.activate(self.a(x)))


class Drops(Mlp):
    def activate(self, x):
        return F.dropout(F.gelu(x), 0.5, self.training)


class DropsAlways(Mlp):
    def activate(self, x):
        return F.dropout(F.gelu(x), 0.5)


class RandomSlope(Mlp):
    def __init__(self):
        super().__init__()
        self.act = nn.RReLU(0.1, 0.9)

    def activate(self, x):
        return self.act(x)


class Noisy(Mlp):
    def activate(self, x):
        return F.gelu(x) * torch.rand_like(x)


class Attends(nn.Module):
    """Attention whose dropout is told by a keyword, as timm's, or by position."""

    def __init__(self, by_position=False, width=32):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.by_position = by_position

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        p = 0.5 if self.training else 0.0
        if self.by_position:
            return self.proj(F.scaled_dot_product_attention(q, k, v, None, p))
        return self.proj(F.scaled_dot_product_attention(q, k, v, dropout_p=p))


class TorchAttention(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 4, dropout=0.5, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


DRAWING = {
    "dropout": Drops,
    "dropout in eval mode too": DropsAlways,
    "nn.Dropout": lambda: nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.5), nn.Linear(64, 32)),
    "rand_like": Noisy,
    "attention dropout": Attends,
    "attention dropout by position": lambda: Attends(by_position=True),
    "nn.MultiheadAttention": TorchAttention,
}


def network(body, *, images=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), Residual(body), nn.Linear(32, 32)), torch.randn(images, 12, 32)


def recomputed(model, x, **options):
    gm = s2a_fx.transform(model, x, (RecomputeBranches(**{"bits": 8, **options}),))
    assert layers(gm, "RecomputedBranch")
    return gm


def in_parts(gm, images):
    for branch in layers(gm, "RecomputedBranch"):
        branch.images = images
    return gm


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_is_equal_and_gradients_are_near_at_8_bits(family):
    model, x = small_model(family)
    gm = recomputed(model, x)
    assert len(layers(gm, "RecomputedBranch")) == BRANCHES[family]
    assert_near(gm, model, x)


def test_gradients_get_nearer_with_every_bit():
    model, x = network(Mlp())
    exact = step(model, x)[1]
    worst = [worst_cosine(step(recomputed(model, x, bits=bits), x)[1], exact)[0] for bits in (2, 4, 6, 8)]
    assert worst == sorted(worst)


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_parts_agree_with_the_whole(family):
    model, _ = small_model(family)
    x = torch.randn(3, *small_model(family)[1].shape[1:])
    gm = recomputed(model, x)
    alone = [branch for branch in layers(gm, "RecomputedBranch") if branch.images]
    assert alone, "no branch runs image by image"
    results = []
    for images in (0, 1, 2, 3, 5):
        for branch in alone:
            branch.images = images
        results.append(step(gm, x))
    for output, grads in results[1:]:
        torch.testing.assert_close(output, results[0][0], rtol=1e-4, atol=1e-5)
        assert worst_cosine(grads, results[0][1]) > (0.999999,)  # codes are an image's own


@pytest.mark.parametrize("images", [0, 1])
def test_an_empty_batch(images):
    model, x = network(Mlp())
    gm = in_parts(recomputed(model, x), images)
    output, grads = step(gm, x[:0])
    assert output.shape == (0, 12, 32)
    assert all(not g.any() for g in grads.values())


@pytest.mark.parametrize("case", DRAWING)
def test_what_is_drawn_inside_is_drawn_again(case):
    model, x = network(DRAWING[case]())
    assert_near(recomputed(model, x), model, x)


@pytest.mark.parametrize(
    ("rate", "fused"), [("attn_drop_rate", True), ("attn_drop_rate", False), ("proj_drop_rate", True), ("drop_path_rate", True)]
)
def test_timm_s_own_dropout_is_drawn_again(rate, fused):
    model, x = small_model("vit", **{rate: 0.5})
    for block in model.blocks:
        block.attn.fused_attn = fused
    assert_near(recomputed(model, x), model, x)


def test_the_generator_stands_where_the_plain_model_leaves_it():
    model, x = network(Drops())
    step(model, x)
    expected = torch.rand(3)
    step(recomputed(model, x), x)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("affine", [True, False])
def test_a_norm_weight_of_zero_has_its_exact_gradient(affine):
    model, x = network(Mlp())
    if affine:
        with torch.no_grad():
            model[1].norm.weight[:4] = 0
    else:
        model[1].norm = nn.LayerNorm(32, elementwise_affine=False)
    assert worst_cosine(step(recomputed(model, x), x)[1], step(model, x)[1]) > (0.999,)


def test_state_dict_has_the_keys_of_the_uncompressed_module(family):
    model, x = small_model(family)
    gm = s2a_fx.transform(model, x, (RecomputeBranches(),))
    assert gm.state_dict().keys() == model.state_dict().keys()
    assert copy.deepcopy(gm).state_dict().keys() == model.state_dict().keys()
    assert dict(gm.named_parameters()).keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("family", ["vit", "swin"])
def test_copies_compute_the_same_and_share_nothing(family, copied):
    model, x = small_model(family)
    gm = recomputed(model, x)
    other = copied(gm)
    assert_same(other, gm, x)
    output, grads = step(gm, x)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1)
    assert torch.equal(step(gm, x)[0], output)
    assert all(torch.equal(g, grads[n]) for n, g in step(gm, x)[1].items())
    assert not torch.equal(step(other, x)[0], output)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_moved_to_another_dtype_follow(dtype):
    model, x = small_model("vit")
    gm = recomputed(model, x).to(dtype)
    output, actual = step(gm, x.to(dtype))
    y, exact = step(model.to(dtype), x.to(dtype))
    assert output.dtype is dtype
    assert torch.equal(output, y)
    assert {g.dtype for g in actual.values()} == {dtype}
    assert worst_cosine(actual, exact) > (0.98,)


def test_weights_replaced_by_a_state_dict_follow():
    model, x = network(Mlp())
    gm = recomputed(model, x)
    other = network(Mlp())[0]
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    gm.load_state_dict(other.state_dict(), assign=True)
    assert_near(gm, other, x)


def test_backward_twice():
    model, x = network(Drops())
    gm = recomputed(model, x)
    loss = gm(x).square().sum()
    loss.backward(retain_graph=True)
    once = {n: p.grad.clone() for n, p in gm.named_parameters()}
    loss.backward()
    for n, p in gm.named_parameters():
        torch.testing.assert_close(p.grad, 2 * once[n])


def test_a_second_derivative_is_refused_or_right():
    model, x = network(Mlp())

    def penalty(module):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(module(leaf).square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), leaf)[0]

    gm = recomputed(model, x)
    try:
        actual = penalty(gm)
    except RuntimeError:
        return
    assert cosine(actual, penalty(model)) > 0.999


def test_without_gradients_it_is_the_plain_module():
    model, x = small_model("vit")
    gm = recomputed(model, x)
    for train in (True, False):
        with torch.no_grad(), Kept() as kept:
            assert torch.equal(gm.train(train)(x), model.train(train)(x))
        assert kept.nbytes == 0


def test_eval_mode_with_gradients_draws_nothing():
    model, x = network(Drops())
    gm = recomputed(model, x).eval()
    y, exact = step(model.eval(), x)
    assert torch.equal(step(gm, x)[0], y)
    assert worst_cosine(step(gm, x, seed=7)[1], exact) > (0.999,)


@pytest.mark.parametrize("family", ["vit", "convnext"])
def test_under_autocast(family):
    model, x = small_model(family)
    gm = recomputed(model, x)

    class Autocast(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.inner(x)

    y, exact = step(Autocast(model), x)
    output, actual = step(Autocast(gm), x)
    assert output.dtype is y.dtype is torch.bfloat16
    assert torch.equal(output, y)
    together = [torch.cat([grads[n].flatten() for n in exact]) for grads in (actual, exact)]
    assert cosine(*together) > 0.98


def test_a_step_of_the_grad_scaler():
    model, x = network(Mlp())
    gm = recomputed(model, x)
    before = gm.get_parameter("1.body.a.weight").detach().clone()
    optimizer, scaler = torch.optim.SGD(gm.parameters(), 0.1), torch.amp.GradScaler("cpu")
    exact = step(model, x)[1]["1.body.a.weight"]
    y = gm(x)
    scaler.scale((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    moved = before - gm.get_parameter("1.body.a.weight")
    assert cosine(moved, exact) > 0.999
    torch.testing.assert_close(moved.norm(), 0.1 * exact.norm(), rtol=0.01, atol=0)


@pytest.mark.parametrize("family", ["vit", "convnext"])
def test_channels_last_images(family):
    model, x = small_model(family)
    gm = recomputed(model, x)
    x = x.to(memory_format=torch.channels_last)
    y, exact = step(model, x)
    output, actual = step(gm, x)
    torch.testing.assert_close(output, y)
    assert worst_cosine(actual, exact) > (0.999,)


def test_called_twice_in_one_forward():
    model, x = network(Drops())
    gm = recomputed(model, x)

    assert_near(Twice(gm), Twice(model), x)


def test_one_layer_in_two_branches():
    shared = Mlp()
    model = nn.Sequential(nn.Linear(32, 32), Residual(shared), Residual(shared), nn.Linear(32, 32))
    x = torch.randn(4, 12, 32)
    assert worst_cosine(step(recomputed(model, x), x)[1], step(model, x)[1]) > (0.999,)


def test_frozen_layers_get_no_gradient():
    model, x = network(Mlp())
    model[1].body.a.requires_grad_(False)
    model[1].norm.weight.requires_grad_(False)
    assert_near(recomputed(model, x), model, x)


def test_another_batch_and_another_number_of_tokens():
    model, x = network(Mlp())
    gm = recomputed(model, x)
    for shape in ((1, 12, 32), (9, 12, 32), (2, 30, 32)):
        x = torch.randn(shape)
        assert worst_cosine(step(gm, x)[1], step(model, x)[1]) > (0.999,)
