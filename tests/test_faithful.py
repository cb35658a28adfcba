"""A rewritten model computes, keeps and trains what its model does, in train mode and in eval mode."""

import copy
import random

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
import transformers
from slow import fast
from torch import nn
from torch.utils.checkpoint import checkpoint

import s2a_fx
from s2a_fx.analysis.measure import measure_saved_bytes
from s2a_fx.graph.inputs import Structure
from s2a_fx.passes import FreezeWeights

X, IMAGES = torch.rand(32, 64), torch.randn(2, 3, 32, 32)


class Body(nn.Module):
    """A body, a dropout and a head; `function` is the forward."""

    def __init__(self, function):
        super().__init__()
        self.body, self.drop, self.head = nn.Sequential(nn.Linear(64, 64), nn.GELU()), nn.Dropout(0.2), nn.Linear(64, 3)
        self.aux, self.function = nn.Linear(64, 3), function

    def forward(self, x):
        return self.function(self, x)


def without_gradients(self, x):
    with torch.no_grad():
        x = self.body(x)
    return self.head(x)


def detached_teacher(self, x):
    with torch.no_grad():
        target = self.drop(self.body(x))
    return self.head(self.body(x) - target)


@torch.no_grad()
def _features(self, x):
    return self.body(x)


def decorated(self, x):
    return self.head(_features(self, x) + self.aux(x).mean())


def noise(self, x):
    return self.head(self.body(x) + torch.randn(64))


def permuted(self, x):
    return self.head(self.body(x)[:, torch.randperm(64)])


def mixed(self, x):
    share = torch.rand(())
    return self.head(share * self.body(x) + (1 - share) * x)


def checkpointed(self, x):
    return self.head(checkpoint(self.body, x, use_reentrant=False))


def checkpointed_with_draws(self, x):
    return self.head(checkpoint(lambda y: self.drop(self.body(y)) * torch.rand(64), x, use_reentrant=False))


def checkpointed_in_train_mode(self, x):
    return self.head(checkpoint(self.body, x, use_reentrant=False) if self.training else self.body(x))


def checkpointed_twice_over(self, x):
    def inner(y):
        return checkpoint(lambda z: self.drop(self.body(z)), F.gelu(self.body(y)), use_reentrant=False)

    return self.head(checkpoint(inner, x, use_reentrant=False))


def checkpointed_with_a_teacher(self, x):
    def inner(y):
        with torch.no_grad():
            target = self.body(y)
        return self.body(y) - self.drop(target)

    return self.head(checkpoint(inner, x, use_reentrant=False))


def clamps_its_weight(self, x):
    with torch.no_grad():
        self.body[0].weight.clamp_(-0.05, 0.05)
    return self.head(self.body(x))


def noise_in_train_mode(self, x):
    x = self.body(x)
    if self.training:
        x = x + torch.randn_like(x)
    return self.head(x)


def masked_in_train_mode(self, x):
    if self.training:
        x = x * (torch.rand(x.shape[0], 1) > 0.3)
    return self.head(self.body(x))


def two_heads_in_train_mode(self, x):
    x = self.body(x)
    return (self.head(x), self.aux(x)) if self.training else (self.head(x) + self.aux(x)) / 2


def hooked(register):
    model = Body(lambda self, x: self.head(self.body(x)))
    register(model)
    return model


def _grayscale(module, args):
    return (args[0] * 9 - 4,)


def _softened(module, args, result):
    return result / 3


def distilled():
    model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=1, num_classes=5)
    model.set_distilled_training(True)
    return model


def timm_checkpoints():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5, proj_drop_rate=0.1)
    model.set_grad_checkpointing()
    return model


FUNCTIONS = [
    without_gradients,
    detached_teacher,
    decorated,
    noise,
    permuted,
    mixed,
    checkpointed,
    checkpointed_with_draws,
    checkpointed_in_train_mode,
    checkpointed_twice_over,
    checkpointed_with_a_teacher,
    clamps_its_weight,
    noise_in_train_mode,
    masked_in_train_mode,
    two_heads_in_train_mode,
]
MODELS = {f.__name__: (lambda f=f: Body(f), X) for f in FUNCTIONS} | {
    "pre-hook": (lambda: hooked(lambda m: m.register_forward_pre_hook(_grayscale)), X),
    "hook": (lambda: hooked(lambda m: m.register_forward_hook(_softened)), X),
    "hook inside": (lambda: hooked(lambda m: m.body.register_forward_hook(_softened)), X),
    "distilled": (distilled, IMAGES),
    "timm's checkpoints": (timm_checkpoints, IMAGES),
}


def step(module, x, training):
    """Results, gradients and buffers of a seeded step."""
    module.train(training)
    module.zero_grad()
    torch.manual_seed(0)
    results = Structure.of(module(x))[0]
    sum(r.square().sum() for r in results).backward()
    return results, {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    assert len(found[0]) == len(expected[0])
    assert all(torch.equal(a, b) for a, b in zip(found[0], expected[0], strict=True))
    assert found[1].keys() == expected[1].keys()
    assert all(torch.equal(found[1][name], gradient) for name, gradient in expected[1].items())


@pytest.mark.parametrize("name", MODELS)
def test_steps_and_kept_bytes_are_the_model_s(name):
    torch.manual_seed(1)
    make, x = MODELS[name]
    model = make()
    gm = s2a_fx.transform(model, (x,), "full")
    for training in (True, False):
        assert_same(step(gm, x, training), step(model, x, training))
        kept = measure_saved_bytes(model, (x,))
        assert (
            measure_saved_bytes(gm, (x,)) == s2a_fx.analyze(gm, (x,)).saved_bytes == kept == s2a_fx.analyze(model, (x,)).saved_bytes
        )


@pytest.mark.parametrize("recipe", ["bias+compress", "lora", "bias+checkpoint"])
@pytest.mark.parametrize(
    "function", [without_gradients, detached_teacher, checkpointed_twice_over, checkpointed_with_a_teacher, clamps_its_weight]
)
def test_passes_edit_what_stands_in_a_context(function, recipe):
    model = Body(lambda self, x: x + self.body(function(self, x).mean(1, keepdim=True) + x))
    gm = s2a_fx.transform(model, (X,), recipe)
    other = s2a_fx.transform(gm, (X,), "full")  # opens and closes the contexts again
    for training in (True, False):
        found, again, expected = (step(module, X, training) for module in (gm, other, model))
        torch.testing.assert_close(found[0], expected[0])
        torch.testing.assert_close(again[0], expected[0])
        assert s2a_fx.analyze(gm.train(), (X,), loss=torch.sum).saved_bytes == measure_saved_bytes(gm, (X,))


def by_its_type(self, x):
    return self.head(self.body(x)) * (2.0 if isinstance(x, torch.Tensor) else 3.0)


def by_an_attribute(self, x):
    return self.head(self.body(x)) * (3.0 if hasattr(x, "no_such_thing") else 2.0)


def by_its_pattern(self, x):
    match x.shape:
        case (_, 64):
            scale = 2.0
        case _:
            scale = 3.0
    return self.head(self.body(x)) * scale


def by_a_number_of_numpy(self, x):
    return self.head(self.body(x) / np.sqrt(8)) * np.float32(0.5).item()


def by_nan(self, x):
    return self.head(self.body(x)).masked_fill(x[:, :3] > 0.9, float("nan")).nan_to_num(0.0)


@pytest.mark.parametrize("function", [by_its_type, by_an_attribute, by_its_pattern, by_a_number_of_numpy, by_nan])
def test_constants_are_those_that_the_model_takes(function):
    torch.manual_seed(0)
    model = Body(function)
    gm = copy.deepcopy(s2a_fx.trace(model, X))
    for training in (True, False):
        assert torch.equal(gm.train(training)(X), model.train(training)(X))


class Block(nn.Module):
    """A residual block of which `function` computes the branch, and a head."""

    def __init__(self, function):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.weight, self.head, self.function = nn.Parameter(torch.randn(64, 64)), nn.Linear(64, 3), function

    def forward(self, x):
        return self.head(x + self.function(self, x))


def norm_without_gradients(self, x):
    with torch.no_grad():
        x = self.norm(x)
    return self.fc2(F.gelu(self.fc1(x)))


def layer_without_gradients(self, x):
    x = self.norm(x)
    with torch.no_grad():
        x = F.gelu(self.fc1(x))
    return self.fc2(x)


@torch.no_grad()
def branch_without_gradients(self, x):
    return self.fc2(F.gelu(self.fc1(self.norm(x))))


def product_in_16_bits(self, x):
    with torch.autocast("cpu", torch.bfloat16):
        return self.fc1(self.norm(x)) @ self.weight


def branch_in_16_bits(self, x):
    with torch.autocast("cpu", torch.bfloat16):
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


def activation_in_32_of_16_bits(self, x):
    x = self.norm(x)
    with torch.autocast("cpu", torch.bfloat16):
        x = self.fc1(x)
        with torch.autocast("cpu", enabled=False):
            x = F.gelu(x.float())
        return self.fc2(x)


@pytest.mark.parametrize(
    "recipe", ["bias", "bias+checkpoint", "full+checkpoint", "bias+compress", "full+compress", "bias+compress-max"]
)
@pytest.mark.parametrize(
    "function",
    [
        norm_without_gradients, layer_without_gradients, branch_without_gradients,
        product_in_16_bits, branch_in_16_bits, activation_in_32_of_16_bits,
    ],
)  # fmt: skip
def test_a_block_that_is_replaced_keeps_the_contexts_inside_and_around_it(function, recipe):
    torch.manual_seed(0)
    model, x = Block(function), X[:, None]
    gm = s2a_fx.transform(model, x, recipe)
    torch.testing.assert_close(gm(x), model(x), rtol=0, atol=0)
    gm(x).sum().backward()
    model(x).sum().backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert not {name for name, p in gm.named_parameters() if p.grad is not None} & without
    assert s2a_fx.analyze(gm, x, loss=torch.sum).saved_bytes == measure_saved_bytes(gm, (x,))


class Counts(nn.Module):
    """Counts its steps in a buffer, by the operator that it is given."""

    def __init__(self, count):
        super().__init__()
        self.layer, self.count, self.steps = nn.Linear(64, 3), count, nn.Buffer(torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.count(self)
        return self.layer(x) / (1 + self.steps)


def _augmented(self):
    self.steps += 1


def _augmented_in_an_alias(self):
    steps = self.steps
    steps += 1
    self.steps = steps


def _in_place(self):
    self.steps.add_(1)


def _catches(self):
    try:
        self.layer(torch.ones(2, 3))
    except RuntimeError:
        self.steps.add_(1)


@pytest.mark.parametrize("count", [_augmented, _augmented_in_an_alias, _in_place, _catches])
def test_a_buffer_that_is_counted_up(count):
    model = Counts(count)
    try:
        gm = copy.deepcopy(s2a_fx.transform(model, (X,), "full"))
    except s2a_fx.TraceError as refusal:
        assert count is _catches and "test_faithful.py: Dynamo cannot follow it" in str(refusal)
        assert torch.__version__ < (2, 12)  # whose Dynamo follows no error that is caught
        return
    for training in (True, True, False):
        assert_same(step(gm, X, training), step(model, X, training))
        assert gm.steps == model.steps
    assert model.steps == 2


def _replaced(self):
    self.steps = self.steps + 1


def test_a_buffer_that_is_replaced_is_refused():
    with pytest.raises(s2a_fx.TraceError, match="in train mode the model writes to steps, the graph to no other buffer"):
        s2a_fx.trace(Counts(_replaced), (X,))


@pytest.mark.parametrize("draw", [random.random, lambda: random.choice([1.0, 2.0]), lambda: random.uniform(0, 1), np.random.rand])
def test_random_numbers_of_python_and_numpy_are_refused_whatever_is_drawn(draw):
    model = Body(lambda self, x: self.head(self.body(x) if draw() < 0.5 else x))
    for seed in range(8):
        random.seed(seed)
        np.random.seed(seed)
        before = random.getstate(), np.random.get_state()[2]
        with pytest.raises(s2a_fx.TraceError, match=r"line \d+ of .*test_faithful.py: draws with Python's or NumPy's random"):
            s2a_fx.trace(model, (X,))
        assert before == (random.getstate(), np.random.get_state()[2])


@pytest.mark.parametrize("name", ["noise_in_train_mode", "masked_in_train_mode", "two_heads_in_train_mode", "distilled"])
def test_what_is_finalized_is_the_model_in_eval_mode(name):
    make, x = MODELS[name]
    model = make()
    finalized = s2a_fx.finalize(s2a_fx.transform(model, (x,), "bias").eval())
    with torch.no_grad():
        found, expected = finalized(x), model.eval()(x)
    torch.testing.assert_close(found, expected)
    assert torch.equal(finalized(x), found)


AUXILIARY = {
    "googlenet": lambda: torchvision.models.googlenet(weights=None, num_classes=3, init_weights=False),
    "inception_v3": lambda: torchvision.models.inception_v3(weights=None, num_classes=3, init_weights=False),
    "two heads": lambda: _AuxiliaryCNN(2),
    "three heads": lambda: _AuxiliaryCNN(3),
}


SIZES = {"googlenet": (64, 64), "inception_v3": (299, 299)}


class _AuxiliaryCNN(nn.Module):
    """Answers with a named tuple in train mode, with the last head alone in eval mode."""

    def __init__(self, heads):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, 2, 1) for _ in range(heads))
        self.heads = nn.ModuleList(nn.Linear(3, 3) for _ in range(heads))

    def forward(self, x):
        found = []
        for conv, head in zip(self.convs, self.heads, strict=True):
            x = F.relu(conv(x))
            if self.training or conv is self.convs[-1]:
                found.append(head(x.mean((2, 3))))
        return dict(enumerate(found)) if self.training else found[-1]


@pytest.mark.parametrize("name", fast(AUXILIARY, "googlenet", "two heads", "three heads"))
def test_auxiliary_heads_answer_in_train_mode_alone(name):
    model, x = AUXILIARY[name](), torch.randn(2, 3, *SIZES.get(name, (32, 32)))
    gm = s2a_fx.trace(model, (x,))
    twin = copy.deepcopy(model)
    for training in (True, False):
        expected, found = twin.train(training)(x), gm.train(training)(x)
        assert type(found) is type(expected)
        if not training:
            assert torch.equal(gm(x), model.eval()(x))


def _hugging_face(name, **options):
    config = getattr(transformers, f"{name}Config")(num_labels=4, **options)
    return getattr(transformers, f"{name}ForImageClassification")(config)


VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 16,
}
NORMED = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
HUGGING_FACE = {
    "ResNet": lambda: _hugging_face("ResNet", **NORMED, layer_type="basic"),
    "RegNet": lambda: _hugging_face("RegNet", **NORMED, groups_width=8),
    "ConvNext": lambda: _hugging_face("ConvNext", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2),
    "ViT": lambda: _hugging_face("ViT", **VIT),
    "Dinov2": lambda: _hugging_face("Dinov2", **VIT),
}


@pytest.mark.parametrize("name", fast(HUGGING_FACE, "ViT"))
def test_hugging_face_models_switch_their_mode_and_keep_what_is_predicted(name):
    model = HUGGING_FACE[name]()
    heads = [n for n, p in model.named_parameters() if p.shape == (4,)]
    gm = s2a_fx.transform(model, (IMAGES,), "bias")
    kept = s2a_fx.transform(model, (IMAGES,), (FreezeWeights(keep=("bias", "classifier.*")),))
    assert {n for n, p in gm.named_parameters() if p.requires_grad} >= set(heads)
    for graph in (gm, kept):
        assert s2a_fx.analyze(graph, (IMAGES,)).saved_bytes == measure_saved_bytes(graph, (IMAGES,))
        twin = copy.deepcopy(graph).eval()
        before = {n: b.clone() for n, b in twin.named_buffers()}
        assert torch.equal(twin(IMAGES).logits, model.eval()(IMAGES).logits)
        assert all(torch.equal(before[n], b) for n, b in twin.named_buffers())
        assert twin.train().training and all(m.training for m in twin.modules())
