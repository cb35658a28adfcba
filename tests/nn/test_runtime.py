"""What happens to a rewritten model between its forward and its backward, or around both: what plain torch does, or its error."""

import copy
import io

import pytest
import timm
import torch
from slow import fast
from small_models import small_model
from timm.layers import register_notrace_module
from torch import nn
from torch.func import functional_call

import s2a_fx
from s2a_fx.analysis.measure import measure_saved_bytes
from s2a_fx.passes import CheckpointBlocks, CompressActivations, RecomputeBranches

RECIPES = ("bias", "bias+checkpoint", "bias+compress", "bias+compress-max", "s2a", "s2a-max", "s2a-paper")
FAMILIES = ("vit", "convnext", "resnet")


@pytest.fixture(scope="module")
def models():
    """Each recipe's model of each family, dropout included; a test copies what it takes."""
    made = {}

    def model(family, recipe):
        if (family, recipe) not in made:
            plain, x = small_model(family, drop_rate=0.1, **({"proj_drop_rate": 0.3} if family == "vit" else {}))
            made[family, recipe] = s2a_fx.transform(plain, (x,), recipe).train(), x
        gm, x = made[family, recipe]
        return copy.deepcopy(gm), x

    return model


def loss_of(gm, x, seed=1):
    torch.manual_seed(seed)
    return gm(x).square().sum()


def gradients(gm):
    return {name: p.grad for name, p in gm.named_parameters() if p.grad is not None}


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def stepped(gm, x, between=lambda gm: None):
    """The gradients of a step in which something happens between forward and backward."""
    loss = loss_of(gm, x)
    between(gm)
    loss.backward()
    return gradients(gm)


@pytest.mark.parametrize("recipe", fast(RECIPES, "s2a-max", "bias+checkpoint"))
@pytest.mark.parametrize("family", FAMILIES)
def test_other_parameters_and_buffers_have_the_gradients_of_a_model_that_holds_them(models, family, recipe):
    gm, x = models(family, recipe)
    others = {n: (1.1 * p.detach() + 0.01).requires_grad_(p.requires_grad) for n, p in gm.named_parameters()}
    buffers = {n: b.clone() + (0.1 if b.is_floating_point() else 0) for n, b in gm.named_buffers()}
    holding = copy.deepcopy(gm)
    with torch.no_grad():
        for name, p in holding.named_parameters():
            p.copy_(others[name])
        for name, b in holding.named_buffers():
            b.copy_(buffers[name])
    loss = loss_of(lambda x: functional_call(gm, (others, buffers), (x,)), x)
    trained = {name: p for name, p in others.items() if p.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    expected = stepped(holding, x)
    assert_equal({name: g for name, g in zip(trained, found, strict=True) if g is not None}, expected)
    assert all(torch.equal(buffers[name], b) for name, b in holding.named_buffers())


def test_parameters_that_are_computed_have_gradients_of_what_they_are_computed_from(models):
    gm, x = models("vit", "bias+compress")
    factor = torch.ones((), requires_grad=True)
    others = {n: p.detach() * factor for n, p in gm.named_parameters() if p.requires_grad}
    loss_of(lambda x: functional_call(gm, others, (x,)), x).backward()
    expected = stepped(gm, x)
    torch.testing.assert_close(factor.grad, sum((g * gm.get_parameter(n).detach()).sum() for n, g in expected.items()))


@pytest.mark.parametrize("recipe", ["bias+checkpoint", "bias+compress", "bias+compress-max", "s2a-max"])
def test_a_weight_changed_in_place_before_the_backward_is_torch_s_error(models, recipe):
    gm, x = models("vit", recipe)
    loss = loss_of(gm, x)
    with torch.no_grad():
        gm.get_parameter("blocks.0.mlp.fc2.weight").mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_norm_s_weight_or_statistic_changed_in_place_is_torch_s_error(models):
    for recipe in ("bias+compress", "bias+checkpoint"):
        for name in ("layer1.0.bn1.weight", "layer1.0.bn1.running_mean"):
            gm, x = models("resnet", recipe)
            gm.requires_grad_(True).eval()
            loss = loss_of(gm, x)
            with torch.no_grad():
                gm.state_dict()[name].add_(1)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


def _freeze_every_other(gm):
    for index, parameter in enumerate(gm.parameters()):
        parameter.requires_grad_(parameter.requires_grad and bool(index % 2))


BETWEEN = {
    "eval": lambda gm: gm.eval(),
    "frozen": lambda gm: gm.requires_grad_(False),
    "some frozen": _freeze_every_other,
    "thawed": lambda gm: gm.requires_grad_(True),
}


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradients_are_those_of_the_forward_and_what_is_frozen_gets_none(models, family, recipe, between):
    gm, x = models(family, recipe)
    expected = stepped(copy.deepcopy(gm), x)
    found = stepped(gm, x, BETWEEN[between])
    trains = {name for name, p in gm.named_parameters() if p.requires_grad}
    assert_equal(found, {name: g for name, g in expected.items() if name in trains})


@pytest.mark.parametrize("between", BETWEEN)
def test_a_model_that_trains_whole_and_is_checkpointed_bears_it_too(between):
    plain, x = small_model("vit", proj_drop_rate=0.3)
    expected = stepped(copy.deepcopy(plain), x)
    gm = s2a_fx.transform(plain, (x,), (CheckpointBlocks(),))
    found = stepped(gm, x, BETWEEN[between])
    trains = {name for name, p in gm.named_parameters() if p.requires_grad}
    assert_equal(found, {name: g for name, g in expected.items() if name in trains})


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_two_backwards_add_up_to_one_and_count_a_batch_once(models, family, recipe):
    gm, x = models(family, recipe)
    whole = stepped(copy.deepcopy(gm), x)
    torch.manual_seed(1)
    output = gm(x)
    statistics = {name: b.clone() for name, b in gm.named_buffers()}
    output[:, :2].square().sum().backward(retain_graph=True)
    output[:, 2:].square().sum().backward()
    assert all(torch.equal(b, statistics[name]) for name, b in gm.named_buffers())
    scale = max(g.abs().max() for g in whole.values())
    for name, g in gradients(gm).items():
        torch.testing.assert_close(g, whole[name], rtol=1e-3, atol=1e-5 * scale.item())


@pytest.mark.parametrize("recipe", fast(RECIPES, "s2a-max"))
@pytest.mark.parametrize("family", fast(FAMILIES, "vit"))
def test_another_batch_size_and_an_unpickled_model_are_analyzed(models, family, recipe):
    gm, x = models(family, recipe)
    file = io.BytesIO()
    torch.save(gm, file)
    file.seek(0)
    unpickled = torch.load(file, weights_only=False)
    assert s2a_fx.analyze(unpickled, (x,)).saved_bytes == s2a_fx.analyze(gm, (x,)).saved_bytes
    assert s2a_fx.analyze(gm, (torch.cat([x, x]),)).batch_size == 4
    assert_equal(stepped(unpickled, x), stepped(gm, x))


class TwoWays(nn.Module):
    """A residual branch that computes one thing in train mode, another in eval mode."""

    def __init__(self, width=64):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate, self.wide, self.out = nn.Linear(width, 128), nn.Linear(width, 128), nn.Linear(128, width)
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        y = self.norm(x)
        y = torch.relu(self.wide(y)) * self.drop(torch.tanh(self.gate(y))) if self.training else self.wide(y) + 1
        return x + self.out(y)


class Counting(nn.Module):
    """A residual branch around a norm that keeps running statistics."""

    def __init__(self, width=64):
        super().__init__()
        self.norm = nn.InstanceNorm1d(width, affine=True, track_running_stats=True)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        return x + self.out(torch.tanh(self.norm(x.mT).mT))


class Averaging(nn.Module):
    """A residual branch that writes to a buffer of its own."""

    def __init__(self, width=64):
        super().__init__()
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, width)
        self.register_buffer("average", torch.zeros(width))

    def forward(self, x):
        y = self.norm(x)
        if self.training:
            with torch.no_grad():
                self.average.mul_(0.9).add_(0.1 * y.detach().mean((0, 1)))
        return x + self.out(torch.tanh(y - self.average))


class Blocks(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.stem, self.blocks, self.head = nn.Linear(8, 64), nn.Sequential(block(), block()), nn.Linear(64, 5)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean(1))


@pytest.mark.parametrize("passes", [(CheckpointBlocks(),), (RecomputeBranches(bits=8),), (CompressActivations(smallest=0),)])
@pytest.mark.parametrize("block", [TwoWays, Counting, Averaging])
def test_branches_of_two_modes_and_with_buffers_of_their_own(block, passes):
    torch.manual_seed(0)
    model, x = Blocks(block), torch.randn(4, 16, 8)
    gm = s2a_fx.transform(model, (x,), passes).train()
    model = copy.deepcopy(model)  # whose buffers the graph shares
    found, expected = stepped(gm, x), stepped(model, x)
    assert found.keys() == expected.keys()
    exact = isinstance(passes[0], CheckpointBlocks)
    assert all((found[n] - g).norm() <= (0 if exact else 0.2) * g.norm() for n, g in expected.items())
    assert all(torch.equal(b, model.state_dict()[name]) for name, b in gm.named_buffers())
    gm.eval()
    model.eval()
    assert torch.equal(gm(x), model(x))


def test_a_branch_of_two_modes_keeps_the_mode_of_its_forward():
    torch.manual_seed(0)
    model, x = Blocks(TwoWays), torch.randn(4, 16, 8)
    for passes in ((CheckpointBlocks(),), (RecomputeBranches(bits=8),)):
        gm = s2a_fx.transform(model, (x,), passes).train()
        expected = stepped(copy.deepcopy(gm), x)
        assert_equal(stepped(gm, x, lambda gm: gm.eval()), expected)
        assert "blocks.1.gate.weight" in expected


class Masked(nn.Module):
    """A residual branch whose attention is a leaf that may take no mask."""

    class Attention(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.qkv = nn.Linear(width, 3 * width)

        def forward(self, x, mask=None, scale=None):
            q, k, v = self.qkv(x).unflatten(-1, (3, -1)).unbind(2)
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return y if scale is None else y * scale

    def __init__(self, width=64):
        super().__init__()
        self.norm, self.attention, self.out = nn.LayerNorm(width), self.Attention(width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.out(self.attention(self.norm(x), None, scale=0.5))


register_notrace_module(Masked.Attention)


@pytest.mark.parametrize("passes", [(CheckpointBlocks(),), (RecomputeBranches(bits=8),), (CompressActivations(smallest=0),)])
def test_none_is_an_operand_like_any_other(passes):
    torch.manual_seed(0)
    model, x = Blocks(Masked), torch.randn(4, 16, 8)
    gm = s2a_fx.transform(model, (x,), passes)
    found, expected = stepped(gm, x), stepped(model, x)
    assert all((found[n] - g).norm() <= 0.2 * g.norm() for n, g in expected.items())


@pytest.mark.parametrize("recipe", ["s2a", "s2a-max", "bias+compress"])
def test_naflexvit(recipe):
    torch.manual_seed(0)
    model = timm.create_model("naflexvit_base_patch16_siglip", depth=1, embed_dim=64, num_heads=2, num_classes=4)
    x = torch.randn(2, 3, 64, 64)
    gm = s2a_fx.transform(model, (x,), recipe).train()
    assert s2a_fx.analyze(gm, (x,)).saved_bytes == measure_saved_bytes(gm, (x,))
    assert all(g.isfinite().all() for g in stepped(gm, x).values())
