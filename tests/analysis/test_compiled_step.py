"""What the compiled step saves, predicted on fake tensors, against what Inductor's own forward hands to autograd."""

import pytest
import torch
from saved_bytes import Kept
from small_models import small_model

import s2a_fx
from s2a_fx.graph.provenance import plain_path


def kept_by_inductor(gm, x):
    """Bytes that the compiled forward saves; copies of weights in another layout, which Inductor makes for the CPU, left out."""
    with Kept(*gm.parameters(), *gm.buffers()) as kept:
        torch.compile(gm, fullgraph=True)(x)
    kinds = {}
    for parameter in gm.parameters():
        kinds.setdefault(parameter.shape, []).append(parameter)
    tensors = kept.storages.values()
    return sum(t.untyped_storage().nbytes() for t in tensors if not any(torch.equal(t, p) for p in kinds.get(t.shape, [])))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["full", "s2a"])
def test_predicted_bytes_are_those_that_the_compiled_forward_saves(family, recipe):
    model, x = small_model(family)
    gm = s2a_fx.transform(model, x, recipe)
    predicted = s2a_fx.analyze(gm, x, mode="compile").saved_bytes
    assert predicted == kept_by_inductor(gm, x)
    if recipe == "s2a":
        assert predicted <= 1.05 * s2a_fx.analyze(gm, x).saved_bytes


@pytest.mark.slow
def test_eager_and_compiled_stand_side_by_side(vit):
    model, x = vit
    both = s2a_fx.compare(model, x, ["bias"], modes=("eager", "compile"))
    eager, compiled = both["bias"], both["bias, compiled"]
    assert compiled.saved_bytes <= eager.saved_bytes
    assert compiled.weight_bytes == eager.weight_bytes
    assert compiled.peak.of("parameter") == eager.peak.of("parameter")
    assert compiled.peak.of("gradient") <= 4 * compiled.trainable_parameters
    wide = max(compiled.activations, key=lambda row: row.bytes)
    assert (wide.op, wide.module) == ("addmm", "blocks.0.mlp.fc1")
    assert wide.operand.startswith("backward.")
    assert "torch.compile" in str(compiled)


@pytest.mark.slow
def test_the_memory_budget_of_the_compiler_counts(vit):
    model, x = vit
    whole = s2a_fx.analyze(model, x, mode="compile")
    with torch._functorch.config.patch(activation_memory_budget=0.0):
        least = s2a_fx.analyze(model, x, mode="compile")
    assert least.saved_bytes < whole.saved_bytes / 2


def test_a_model_that_does_not_train_saves_nothing(vit):
    model, x = vit
    report = s2a_fx.analyze(model.requires_grad_(False), x, mode="compile")
    assert report.saved_bytes == 0
    assert report.peak_bytes > report.weight_bytes


def test_an_unknown_mode_is_told(vit):
    model, x = vit
    with pytest.raises(s2a_fx.InputError, match=r"mode: got 'compiled', wanted eager or compile\."):
        s2a_fx.analyze(model, x, mode="compiled")


def test_paths_are_the_models_own():
    assert plain_path("getattr(getattr(L['self'].stages, '0').blocks, '1').norm") == "stages.0.blocks.1.norm"
    assert plain_path("L['self'].blocks.0.norm1.recomputed_branch.body.blocks.0.attn.qkv") == "blocks.0.attn.qkv"
    assert plain_path("stem.1") == "stem.1"
    assert plain_path("L['self'].backbone.body.layer1.conv1") == "backbone.body.layer1.conv1"


class Pair(torch.nn.Module):
    def __init__(self, give):
        super().__init__()
        self.layer, self.give = torch.nn.Linear(8, 8), give

    def forward(self, x):
        return self.give(torch.relu(self.layer(x)))


def test_several_outputs_are_told_apart():
    gm = Pair(lambda y: {"a": y * 2, "b": y.sin()})
    x = torch.randn(4, 8)
    report = s2a_fx.analyze(gm, x, mode="compile", loss=lambda out: out["a"].sum() + out["b"].mean())
    assert report.peak.of("gradient") <= 4 * report.trainable_parameters
    assert report.saved_bytes > 0


@pytest.mark.parametrize("give", [lambda y: (y, y), lambda y: (y, y.view(-1)), lambda y: (y.detach() * 2, y)])
def test_outputs_that_are_not_distinct_are_refused(give):
    with pytest.raises(s2a_fx.InputError, match="each once"):
        s2a_fx.analyze(Pair(give), torch.randn(4, 8), mode="compile", loss=lambda out: out[-1].sum())


@pytest.mark.parametrize("modes", [(), "compiled", ("eager", "eager")])
def test_modes_are_checked_at_the_door(modes):
    with pytest.raises(s2a_fx.InputError, match="mode"):
        s2a_fx.compare(torch.nn.Linear(8, 8), torch.randn(4, 8), ["full"], modes=modes)
