"""Residual branches that begin with a norm: which are found, where they end, what they read, and which are none."""

import pytest
import torch
import torch.nn.functional as F
from small_models import small_model
from torch import nn

import s2a_fx
from s2a_fx.analysis.measure import measure_saved_bytes
from s2a_fx.analysis.normalized_branches import normalized_branches
from s2a_fx.passes import CompressActivations


class Residual(nn.Module):
    def __init__(self, body, norm=None):
        super().__init__()
        self.norm = norm or nn.LayerNorm(32)
        self.body = body

    def forward(self, x):
        return x + self.body(self.norm(x))


class ReadTwice(Residual):
    def forward(self, x):
        y = self.norm(x)
        return x + self.body(y) + y.mean()


class NotAdded(Residual):
    def forward(self, x):
        return self.body(self.norm(x))


class Functional(Residual):
    def forward(self, x):
        return x + self.body(F.layer_norm(x, (32,), self.norm.weight, self.norm.bias, 1e-3))


class ReadsTheBlock(Residual):
    """Cross attention of a kind: the branch reads the raw block input, too."""

    def forward(self, x):
        return x + self.body(self.norm(x) * x)


class Scaled(Residual):
    def __init__(self, body):
        super().__init__(body)
        self.gamma = nn.Parameter(torch.ones(32))

    def forward(self, x):
        return x + self.body(self.norm(x)) * self.gamma


def mlp(*between):
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), *between, nn.Linear(64, 32))


def branches_of(block, x=None):
    x = torch.randn(2, 5, 32) if x is None else x
    return normalized_branches(s2a_fx.trace(nn.Sequential(nn.Linear(32, 32), block), x))


@pytest.mark.parametrize(("family", "count"), [("vit", 6), ("swin", 10), ("convnext", 5), ("resnet", 0)])
def test_every_branch_of_a_family_is_found(family, count):
    branches = normalized_branches(s2a_fx.trace(*small_model(family)))
    assert len(branches) == count
    owned = [node for branch in branches for node in (branch.norm, *branch.nodes)]
    assert len(owned) == len(set(owned))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("rate", ["attn_drop_rate", "proj_drop_rate", "drop_path_rate"])
def test_dropout_hides_no_branch(rate, fused):
    model, x = small_model("vit", **{rate: 0.5})
    for block in model.blocks:
        block.attn.fused_attn = fused
    assert len(normalized_branches(s2a_fx.trace(model, x))) == 6


def test_a_branch_ends_with_its_last_linear_layer():
    (branch,) = branches_of(Residual(mlp()))
    assert [str(n.target) for n in (branch.norm, *branch.nodes)] == ["1.norm", "1.body.0", "1.body.1", "1.body.2"]
    assert branch.tail is branch.output is branch.nodes[-1]
    assert (branch.weight, branch.bias) == ("1.norm.weight", "1.norm.bias")
    assert (branch.rule.eps, branch.rule.centered) == (1e-5, True)
    assert str(branch.source.target) == "0"
    assert branch.operands == ()
    assert branch.by_image


class Called(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first, self.function, self.last = nn.Linear(32, 64), function, nn.Linear(64, 32)

    def forward(self, x):
        return self.last(self.function(self.first(x), self.training))


@pytest.mark.parametrize(
    ("function", "draws"),
    [
        (lambda x, training: F.dropout(x, 0.1), True),
        (lambda x, training: F.dropout(x, 0.0), False),
        (lambda x, training: F.dropout(x, 0.1, training), True),
        (lambda x, training: F.dropout(x, 0.0, training), False),
        (lambda x, training: F.scaled_dot_product_attention(x, x, x, None, 0.1), True),
        (lambda x, training: F.scaled_dot_product_attention(x, x, x), False),
        (lambda x, training: x + torch.rand_like(x), True),
        (lambda x, training: x / x.norm(p=2, dim=-1, keepdim=True), False),
    ],
)
def test_a_branch_that_calls_what_draws_does_not_run_by_image(function, draws):
    (branch,) = branches_of(Residual(Called(function)))
    assert branch.by_image is not draws


def test_dropout_after_the_last_layer_stays_outside_and_dropout_before_it_draws():
    (after,) = branches_of(Residual(nn.Sequential(mlp(), nn.Dropout(0.5))))
    assert str(after.output.target) == "1.body.0.2"
    assert after.by_image
    (inside,) = branches_of(Residual(mlp(nn.Dropout(0.5))))
    assert not inside.by_image
    assert not inside.by_image


def test_a_frozen_scale_stays_outside_and_a_trained_one_does_not():
    block = Scaled(mlp())
    (trained,) = branches_of(block)
    assert trained.tail is None
    assert [str(o.target) for o in trained.operands] == ["1.gamma"]
    block.gamma.requires_grad_(False)
    (frozen,) = branches_of(block)
    assert str(frozen.output.target) == "1.body.2"
    assert frozen.tail is frozen.output


def test_a_functional_norm_and_an_rms_norm():
    (branch,) = branches_of(Functional(mlp()))
    assert (branch.rule.eps, branch.weight) == (1e-3, "1.norm.weight")


def test_a_norm_without_parameters():
    (branch,) = branches_of(Residual(mlp(), nn.LayerNorm(32, elementwise_affine=False)))
    assert (branch.weight, branch.bias) == (None, None)


@pytest.mark.parametrize("block", [ReadTwice, NotAdded, ReadsTheBlock])
def test_what_is_no_branch(block):
    assert branches_of(block(mlp())) == ()


def test_batch_norm_inside_is_no_branch():
    body = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(5), nn.Linear(64, 32))
    assert branches_of(Residual(body)) == ()
    assert branches_of(Residual(mlp(), nn.LayerNorm((5, 32)))) == ()  # over two dimensions


@pytest.mark.parametrize(
    "norm",
    [
        lambda x, w: F.layer_norm(x, x.shape[-1:], w),
        lambda x, w: F.layer_norm(x, w.shape, w),
        lambda x, w: F.rms_norm(x, x.shape[-1:], w, 1e-5),
        lambda x, w: F.layer_norm(x, (x.shape[-1],), w),
        lambda x, w: torch.layer_norm(x, [x.size(-1)], w),
        lambda x, w: F.layer_norm(normalized_shape=w.size(), weight=w, input=x),
        lambda x, w: torch.ops.aten.layer_norm.default(x, [x.size(-1)], w),
    ],
    ids=["shape", "weight_shape", "rms_norm", "tuple", "size", "keywords", "aten"],
)
def test_a_norm_over_a_shape_that_is_read_from_a_tensor(norm):
    class Shaped(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.body = nn.Parameter(torch.ones(32)), mlp()

        def forward(self, x):
            return x + self.body(norm(x, self.weight))

    (branch,) = branches_of(Shaped())
    assert (branch.rule.eps, branch.weight, branch.bias) == (1e-5, "1.weight", None)
    assert str(branch.source.target) == "0"
    model, x = nn.Sequential(nn.Linear(32, 32), Shaped()), torch.randn(64, 16, 32)
    gm = s2a_fx.transform(model, (x,), [CompressActivations()])
    assert any(type(module).__name__ == "CodedLayerNorm" for module in gm.modules())
    assert s2a_fx.analyze(gm, x).saved_bytes == measure_saved_bytes(gm, (x,))


def test_a_norm_whose_weight_is_computed_is_none():
    class Doubled(Residual):
        def forward(self, x):
            return x + self.body(F.layer_norm(x, (32,), self.norm.weight * 2))

    assert branches_of(Doubled(mlp())) == ()


def test_a_branch_ends_before_a_model_s_own_drop_path():
    class DropPath(nn.Module):
        def forward(self, x):
            return x / 0.9 * torch.rand(len(x), 1, 1).add(0.9).floor_() if self.training else x

    (branch,) = branches_of(Residual(nn.Sequential(mlp(), DropPath())))
    assert str(branch.output.target) == "1.body.0.2"
    assert branch.by_image


@pytest.mark.parametrize(
    ("between", "by_image"),
    [
        (lambda x: x.softmax(-1), True),
        (lambda x: x.softmax(dim=-3), False),
        (lambda x: torch.softmax(x, 0), False),
        (lambda x: x - x.mean(dim=(1, 2), keepdim=True), True),
        (lambda x: x - x.mean(), False),
        (lambda x: torch.maximum(x, x.roll(1, -1)), True),
        (lambda x: x + x.roll(1, 0), False),
        (lambda x: torch.max(x, x * 2), True),
        (lambda x: F.normalize(x, dim=0), False),
        (lambda x: F.normalize(x, dim=-1), True),
    ],
)
def test_what_lets_images_meet_does_not_run_by_image(between, by_image):
    (branch,) = branches_of(Residual(Called(lambda x, training: between(x))), torch.randn(3, 5, 32))
    assert branch.by_image is by_image
