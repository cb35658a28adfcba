"""CompressActivations and the recipes that end with it: bytes, training, modes, what is left alone and what is refused."""

import operator

import pytest
import torch
from small_models import small_model
from steps import layers, step, ten_steps, worst_cosine
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import s2a_fx
from s2a_fx.analysis.measure import measure_saved_bytes
from s2a_fx.passes import CompressActivations, FreezeWeights, RecomputeBranches

RECIPES = ["s2a", "s2a-max"]
TRAINED = [
    *(("vit", "s2a"), ("convnext", "s2a"), ("resnet", "s2a"), ("vit", "s2a-max")),
    pytest.param("swin", "s2a", marks=pytest.mark.slow),
]
ALL = CompressActivations(smallest=1)


def uncompressed(recipe):
    """The passes of a recipe that change what trains and how it is computed, not what is kept."""
    return tuple(p for p in s2a_fx.RECIPES[recipe] if not isinstance(p, CompressActivations | RecomputeBranches))


def grown(model, x, recipe):
    """The model with parts that a task has changed: as they begin, the side branch and the prompts have no gradient."""
    torch.manual_seed(1)
    gm = s2a_fx.transform(model, x, recipe)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in gm.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return gm


def seeded(module, x):
    torch.manual_seed(1)
    with torch.enable_grad():
        return module(x).detach()


@pytest.mark.parametrize("family", ["vit", "convnext"])
def test_predicted_bytes_equal_bytes_held_by_autograd_when_all_is_coded_and_trained(family):
    model, x = small_model(family)
    gm = s2a_fx.transform(model, x, (ALL,))
    predicted = s2a_fx.analyze(gm, x).saved_bytes
    assert predicted == measure_saved_bytes(gm, (x,))
    assert predicted < 0.45 * measure_saved_bytes(model, (x,))


@pytest.mark.parametrize(("family", "recipe"), TRAINED)
def test_a_batch_s_gradient_is_the_sum_of_its_images_gradients(family, recipe):
    """Codes are an image's own, so that accumulated batches and several processes train as one whole batch does."""
    options = {} if family == "resnet" else {"drop_path_rate": 0.0}
    model, x = small_model(family, **options)
    x = torch.cat((x, 2 * x.flip(0)))
    gm = grown(model, x, recipe)
    for module in gm.modules():
        if isinstance(module, _BatchNorm):
            module.eval()  # its statistics are of the batch

    def gradient(*batches):
        gm.zero_grad()
        for images in batches:
            gm(images).square().sum().backward()
        return {name: p.grad.clone() for name, p in gm.named_parameters() if p.grad is not None}

    whole, parts = gradient(x), gradient(x[0::2], x[1:2], x[3:])
    for name, exact in whole.items():
        torch.testing.assert_close(
            parts[name], exact, rtol=0, atol=1e-4 * exact.norm().item() + 1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(("family", "recipe"), TRAINED)
def test_output_is_that_of_the_uncompressed_recipe_and_gradients_are_near(family, recipe):
    model, x = small_model(family)
    gm, reference = (grown(model, x, r) for r in (recipe, uncompressed(recipe)))
    y, exact = step(reference, x)
    output, actual = step(gm, x)
    assert torch.equal(output, y)
    joined = [{"all": torch.cat([g[n].flatten() for n in exact if n != "input"])} for g in (actual, exact)]
    assert worst_cosine(*joined) > (0.999,)
    assert torch.equal(gm.eval()(x), reference.eval()(x))


@pytest.mark.parametrize(("family", "recipe"), TRAINED)
def test_ten_steps_lower_the_loss(family, recipe):
    model, x = small_model(family)
    losses = ten_steps(s2a_fx.transform(model, x, recipe), x)
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("recipe", RECIPES)
def test_eval_after_train_is_deterministic(recipe):
    model, x = small_model("vit", drop_path_rate=0.5, proj_drop_rate=0.5)
    gm = s2a_fx.transform(model, x, recipe).train()
    assert not torch.equal(gm(x), gm(x))
    gm.eval()
    assert torch.equal(gm(x), gm(x))
    with torch.no_grad():
        assert torch.equal(gm(x), seeded(gm, x))


@pytest.mark.parametrize("family", ["vit", "convnext"])
def test_what_trains_is_the_same_as_uncompressed(family):
    model, x = small_model(family)
    names = [
        {n for n, p in s2a_fx.transform(model, x, recipe).named_parameters() if p.requires_grad}
        for recipe in ("s2a", uncompressed("s2a"))
    ]
    assert names[0] == names[1]


def test_exact_forms_have_exact_gradients():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, bias=False),
        nn.LeakyReLU(0.1),
        nn.Dropout(0.3),
        nn.Conv2d(8, 4, 1),
    )
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            layer.weight.requires_grad_(False)
    x = torch.randn(2, 3, 16, 16)
    gm = s2a_fx.transform(model, x, (ALL,))
    y, exact = step(model, x)
    output, actual = step(gm, x)
    assert torch.equal(output, y)
    assert actual.keys() == exact.keys()
    for name in exact:
        torch.testing.assert_close(actual[name], exact[name], rtol=1e-5, atol=1e-6)
    kinds = {type(m).__name__ for m in gm.modules()}
    assert {"FrozenConvolution", "MaskedActivation", "CodedDropout"} <= kinds
    assert "CodedInput" not in kinds


def test_nodes_that_keep_little_are_left_alone(vit):
    gm = s2a_fx.transform(*vit, (CompressActivations(smallest=10**9),))
    assert not any(type(m).__name__.startswith(("Coded", "Masked", "Frozen")) for m in gm.modules())


def test_fewer_bits_keep_fewer_bytes():
    model, x = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 8), nn.Softmax(-1)), torch.randn(16, 32)
    kept = []
    for bits in (1, 4, 6):
        gm = s2a_fx.transform(model, x, (CompressActivations(bits, bits, input_bits=bits, smallest=1),))
        kept.append(s2a_fx.analyze(gm, x).saved_bytes)
    assert kept[0] < kept[1] < kept[2]


def test_a_model_that_keeps_nothing_is_left_alone(vit):
    gm = s2a_fx.transform(*vit, (FreezeWeights(keep=("head.bias",)), ALL))
    assert s2a_fx.analyze(gm, vit[1]).saved_bytes == 0
    assert torch.equal(seeded(gm, vit[1]), seeded(vit[0], vit[1]))


@pytest.mark.slow
def test_without_norm_branches_there_are_notes_and_no_errors():
    model, x = small_model("resnet")
    for recipe in RECIPES:
        gm = s2a_fx.transform(model, x, recipe)
        assert not layers(gm, "RecomputedBranch")
        assert all(note.reason for note in s2a_fx.analyze(gm, x).notes)


def test_an_activation_in_place_is_read_by_later_users_as_overwritten():
    class Overwrites(nn.Module):
        def __init__(self, act):
            super().__init__()
            self.a = nn.Linear(16, 16)
            self.act = act

        def forward(self, x):
            h = self.a(x)
            y = self.act(h)
            return y + h

    activations = (nn.ReLU(inplace=True), nn.SiLU(inplace=True), nn.Hardtanh(-0.5, 0.5, inplace=True), nn.ELU(inplace=True))
    for act in (*activations, nn.Dropout(0.5, inplace=True)):
        model, x = Overwrites(act), torch.randn(6, 16)
        gm = s2a_fx.transform(model, x, (CompressActivations(6, smallest=1),))
        y, exact = step(model, x)
        output, actual = step(gm, x)
        assert torch.equal(output, y)
        assert worst_cosine(actual, exact) > (0.999,)


class Spelled(nn.Module):
    """An activation between two layers, by any function."""

    def __init__(self, function, *args):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.function, self.options = function, args

    def forward(self, x):
        return self.b(self.function(self.a(x), *self.options))


@pytest.mark.parametrize(
    ("function", "args", "form"),
    [
        (torch.ops.aten.silu_.default, (), "CodedActivation"),
        (torch.ops.aten.mish.default, (), "CodedActivation"),
        (torch.special.expit, (), "CodedActivation"),
        (operator.methodcaller("tanh_"), (), "CodedActivation"),
        (nn.functional.leaky_relu_, (0.2,), "MaskedActivation"),
        (nn.functional.hardtanh, (-1.0, 1.0), "MaskedActivation"),
        (torch.clamp_, (-1.0, 1.0), "MaskedActivation"),
    ],
    ids=["aten.silu_", "aten.mish", "special.expit", "Tensor.tanh_", "leaky_relu_", "hardtanh", "clamp_"],
)
def test_an_activation_is_compressed_however_it_is_spelled(function, args, form):
    model, x = Spelled(function, *args), torch.randn(6, 16)
    gm = s2a_fx.transform(model, x, (CompressActivations(6, smallest=1),))
    assert form in [type(m).__name__ for m in gm.modules()]
    (y, exact), (output, actual) = step(model, x), step(gm, x)
    assert torch.equal(output, y)
    assert worst_cosine(actual, exact) > (0.999,)


@pytest.mark.parametrize(
    "options",
    [
        {"activation_bits": 0},
        {"norm_bits": 9},
        {"input_bits": True},
        {"input_bits": 2.0},
        {"smallest": -1},
        {"smallest": "64k"},
    ],
    ids=str,
)
def test_bad_options_are_refused(options):
    with pytest.raises(s2a_fx.InputError):
        CompressActivations(**options)
