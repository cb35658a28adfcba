"""Models that something was done to before they are given: compiled, scripted, quantized, their weights computed from others."""

import copy
import warnings

import pytest
import torch
import torch.nn.utils.parametrizations as parametrizations
from torch import nn
from torch.nn.utils import parametrize, prune, spectral_norm, weight_norm

import s2a_fx
from s2a_fx.analysis.measure import measure_saved_bytes
from s2a_fx.graph.metadata import notes_of
from s2a_fx.passes import CheckpointBlocks, CompressActivations

X = torch.randn(4, 8)


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


def net():
    torch.manual_seed(0)
    block = Residual(nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)))
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), block, nn.Linear(16, 3))


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).mT


WEIGHTS = {
    "weight_norm": lambda layer: weight_norm(layer),
    "spectral_norm": lambda layer: spectral_norm(layer),
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "parametrized weight_norm": lambda layer: parametrizations.weight_norm(layer),
    "parametrized spectral_norm": lambda layer: parametrizations.spectral_norm(layer),
    "orthogonal": lambda layer: parametrizations.orthogonal(layer),
    "one's own": lambda layer: parametrize.register_parametrization(layer, "weight", Symmetric()),
}


def computed(name, is_run):
    """The net with a weight that is computed from others, before or after its first forward."""
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        WEIGHTS[name](model[2].inner[0])
    if is_run:
        model(X)
    return model


def step(model, own):
    """Output and gradients; `own` is the state that it starts with."""
    for name, value in own.items():
        model.state_dict()[name].copy_(value)
    model.zero_grad()
    output = model(X)
    output.square().sum().backward()
    return output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recipe", ["full", "bias+checkpoint", "bias+compress", "lora"])
@pytest.mark.parametrize("is_run", [False, True])
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_are_computed_from_others(name, is_run, recipe):
    model = computed(name, is_run)
    gm = s2a_fx.transform(model, (X,), recipe)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    assert s2a_fx.analyze(gm, (X,)).saved_bytes == measure_saved_bytes(gm, (X,))
    for training in (True, False):
        output, found = step(gm.train(training), own)
        expected, gradients = step(model.train(training), own)
        assert torch.equal(output, expected)
        if recipe != "lora":
            trains = {n for n, p in gm.named_parameters() if p.requires_grad}
            for n in trains:
                torch.testing.assert_close(found[n], gradients[n])
    finalized = s2a_fx.finalize(gm.eval())
    torch.testing.assert_close(finalized(X), gm(X))


@pytest.mark.parametrize("name", ["spectral_norm", "parametrized spectral_norm"])
def test_a_power_iteration_goes_on_once_a_step(name):
    model = computed(name, False)
    gm = s2a_fx.transform(model, (X,), (CheckpointBlocks(), CompressActivations(smallest=0))).train()
    assert any("cannot run twice" in note.reason for note in notes_of(gm))
    own = {name: value.clone() for name, value in model.state_dict().items()}
    step(gm, own)
    after = {name: value.clone() for name, value in gm.state_dict().items()}
    step(model.train(), own)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in after.items() if name in own)


def _compiled_in_place(model):
    model.compile()
    return model


def _compiled_inside(model):
    model[2] = torch.compile(model[2])
    return model


@pytest.mark.parametrize("compiled", [torch.compile, _compiled_in_place, _compiled_inside])
def test_a_compiled_model_is_the_model_inside(compiled):
    model, plain = compiled(net()), net()
    for recipe in ("full", "bias+compress"):
        gm = s2a_fx.transform(model, (X,), recipe)
        assert torch.equal(gm(X), plain(X))
    assert s2a_fx.analyze(model, (X,)).model == "Sequential"
    assert s2a_fx.compare(model, (X,), ["bias"]).reports[0].model == "Sequential"
    if compiled is torch.compile:
        assert s2a_fx.trace(model, (X,)).state_dict().keys() == plain.state_dict().keys()


def _script_inside(model):
    model[2] = torch.jit.script(model[2])
    return model


def _quantized(model):
    return torch.ao.quantization.quantize_dynamic(model.eval(), {nn.Linear}, torch.qint8)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(8, 8)

    def forward(self, x):
        return self.rnn(x)[0]


REFUSED = {
    "scripted": (lambda: torch.jit.script(net()), "TorchScript"),
    "traced by torch.jit": (lambda: torch.jit.trace(net(), X), "TorchScript"),
    "scripted inside": (lambda: _script_inside(net()), r"^2 \(RecursiveScriptModule\)"),
    "quantized": (lambda: _quantized(net()), "quantized weights"),
    "quantized inside": (lambda: nn.Sequential(nn.Linear(8, 8), _quantized(net())), r"^1\.0.*quantized weights"),
    "quantized RNN": (lambda: torch.ao.quantization.quantize_dynamic(Recurrent(), {nn.LSTM}), "quantized weights"),
    "no module": (lambda: net().forward, "wanted an nn.Module"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_traced_is_told_for_what_it_is(name):
    make, text = REFUSED[name]
    model = make()
    for run in (s2a_fx.trace, s2a_fx.transform, s2a_fx.analyze, s2a_fx.compare):
        with pytest.raises(s2a_fx.InputError, match=text):
            run(model, (X,))


def test_a_tensor_with_a_gradient_in_an_attribute_is_told():
    model = net()
    model.scale = nn.Parameter(torch.ones(())) * 2
    with pytest.raises(s2a_fx.InputError, match="or a buffer"):
        s2a_fx.trace(model, (X,))
    model.scale = model.scale.detach()
    assert torch.equal(s2a_fx.trace(copy.deepcopy(model), (X,))(X), model(X))
