"""The peak: within two percent of what the allocator counts, and a timeline whose parts add up."""

import contextlib

import pytest
import torch
from slow import fast
from small_models import SMALL, small_model
from timm.layers import register_notrace_module
from torch import nn
from torch.utils.checkpoint import checkpoint

import s2a_fx
from s2a_fx.analysis import simulation
from s2a_fx.analysis.measure import measure_peak_bytes
from s2a_fx.analysis.peak import peak, timeline
from s2a_fx.analysis.simulation import simulate
from s2a_fx.nn import recompute
from s2a_fx.passes import CompressActivations, FreezeWeights, RecomputeBranches


@pytest.mark.parametrize("recipe", fast(["full", "bias", "s2a-paper", "s2a", "s2a-max"], "full", "s2a"))
@pytest.mark.parametrize("family", fast(SMALL, "vit", "convnext", "resnet"))
def test_predicted_peak_is_within_two_percent_of_the_allocator_s(family, recipe):
    model, x = small_model(family)
    gm = s2a_fx.transform(model, x, recipe)
    optimizer = torch.optim.AdamW([p for p in gm.parameters() if p.requires_grad])
    assert s2a_fx.analyze(gm, x).peak_bytes == pytest.approx(measure_peak_bytes(gm, (x,), optimizer), rel=0.02)


@pytest.mark.parametrize("plan", fast(["recompute", "map"], "recompute"))
def test_of_many_parts_a_few_tell_the_peak(vit, plan, monkeypatch):
    model, x = vit
    x = torch.cat([x] * 4)
    monkeypatch.setattr(recompute, "PART_BYTES", 20_000)
    branches = () if plan == "map" else (RecomputeBranches(kinds=("mlp",), part_mb=1),)
    gm = s2a_fx.transform(model, x, (FreezeWeights(), *branches, CompressActivations(attention_plan=plan, smallest=1)))
    some = peak(timeline(gm, simulate(gm)))
    monkeypatch.setattr(simulation, "at_most_parts", lambda count: contextlib.nullcontext())
    assert peak(timeline(gm, simulate(gm))) == some
    optimizer = torch.optim.AdamW([p for p in gm.parameters() if p.requires_grad])
    assert some.bytes == pytest.approx(measure_peak_bytes(gm, (x,), optimizer), rel=0.02)


def test_timeline_tells_kinds_and_where_the_peak_stands(vit):
    report = s2a_fx.analyze(*vit)
    weights = sum(p.numel() * 4 for p in vit[0].parameters())
    assert {m.phase for m in report.timeline} == {"forward", "loss", "backward", "optimizer"}
    assert all(m.of("parameter") == weights for m in report.timeline[1:])
    assert report.peak.bytes == max(m.bytes for m in report.timeline)
    last = report.timeline[-1]
    assert last.of("gradient") == weights
    assert last.of("optimizer") == 2 * weights + 4 * len(list(vit[0].parameters()))


def test_optimizer_state_counts_from_the_start(vit):
    with_state, without = (s2a_fx.analyze(*vit, optimizer=o) for o in ("adamw", "sgd"))
    assert with_state.peak_bytes - without.peak_bytes >= 2 * with_state.weight_bytes


def test_own_optimizer_and_loss_are_simulated(vit):
    own = s2a_fx.analyze(*vit, optimizer=lambda p: torch.optim.AdamW(p, foreach=False), loss=lambda y: y.square().sum())
    assert "loss: the given function" in own.assumptions
    assert own.peak.of("optimizer") == s2a_fx.analyze(*vit).peak.of("optimizer")


def test_a_frozen_model_has_a_forward_and_no_backward():
    model = nn.Linear(4, 4).requires_grad_(False)
    report = s2a_fx.analyze(nn.Sequential(model), torch.randn(2, 4))
    assert report.saved_bytes == 0
    assert "backward" not in {m.phase for m in report.timeline}


def test_a_loss_that_is_no_number_is_refused(vit):
    with pytest.raises(s2a_fx.InputError, match=r"loss: got a tensor of shape \(2, 5\)"):
        s2a_fx.analyze(*vit, loss=lambda y: y)


class CheckpointedInside(nn.Module):
    """One node of a graph, which checkpoints a part of itself."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return checkpoint(lambda y: y.sigmoid().exp(), self.layer(x), use_reentrant=False)


def test_what_a_module_checkpoints_by_itself_is_not_computed_again_in_the_forward():
    register_notrace_module(CheckpointedInside)
    gm = s2a_fx.trace(nn.Sequential(CheckpointedInside(), nn.Linear(8, 4)), torch.randn(2, 8))
    made = [(event.place.phase, event.place.op) for event in simulate(gm).events if event.bytes > 0]
    assert made.count(("forward", "sigmoid")) == 1
    assert made.count(("backward", "sigmoid")) == 1
