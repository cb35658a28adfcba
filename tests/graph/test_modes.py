"""One graph for both modes, which switches as the model does; a checkpoint of one mode stays one checkpoint."""

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import s2a_fx
from s2a_fx.analysis.measure import measure_saved_bytes
from s2a_fx.graph.capture import trace
from s2a_fx.graph.regions import Checkpoint


def noise_in_train_mode(x, training):
    return x + torch.randn_like(x) if training else x


def another_function(x, training):
    return x + 1 if training else x * 2


def dropout(x, training):
    return F.dropout(x, 0.5, training)


def scale_in_eval_mode(x, training):
    return x if training else x * 2


class Checkpointed(nn.Module):
    """Checkpoints in one mode, or in both, a part that differs between them."""

    def __init__(self, function, modes):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.function, self.modes = function, modes

    def part(self, x):
        return F.gelu(self.b(self.function(F.gelu(self.a(x)), self.training)))

    def forward(self, x):
        return self.c(checkpoint(self.part, x, use_reentrant=False) if self.training in self.modes else self.part(x))


def step(module, x):
    torch.manual_seed(0)
    result = module(x)
    return [result, *torch.autograd.grad(result.square().sum(), [*module.parameters()])]


@pytest.mark.parametrize("function", [noise_in_train_mode, another_function, dropout, scale_in_eval_mode])
@pytest.mark.parametrize("modes", [(True,), (False,), (True, False)])
def test_a_checkpoint_around_what_differs_stays_one(function, modes):
    model, x = Checkpointed(function, modes), torch.randn(4, 8)
    gm = trace(model, x)
    assert sum(isinstance(m, Checkpoint) for m in gm.modules()) == 1
    for training in (True, False):
        expected, found = map(functools.partial(step, x=x), (model.train(training), gm.train(training)))
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


class FrozenNorms(nn.Module):
    """Leaves its norms in eval mode, as fine-tuning with small batches does."""

    def __init__(self, **frozen):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, 8, 3))
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 2)

    def forward(self, x):
        x = nn.functional.dropout(self.norm(self.layers(x)), 0.3, self.norm.training)
        return self.head(x.mean((2, 3)))

    def train(self, mode=True):
        super().train(mode)
        self.layers[1].eval()
        self.norm.eval()
        return self


class Backbone(nn.Module):
    """A part of the model that never trains."""

    def __init__(self):
        super().__init__()
        self.frozen, self.head = FrozenNorms().requires_grad_(False), nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.frozen(x))

    def train(self, mode=True):
        super().train(mode)
        self.frozen.eval()
        return self


class AlwaysDropping(nn.Module):
    """Draws in eval mode, too, as Monte Carlo dropout does."""

    def __init__(self):
        super().__init__()
        self.layer, self.drop, self.head = nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.drop(self.layer(x)))

    def train(self, mode=True):
        super().train(mode)
        self.drop.train()
        return self


@pytest.mark.parametrize("recipe", ["full", "bias", "bias+compress"])
@pytest.mark.parametrize("kind", [FrozenNorms, Backbone, AlwaysDropping])
def test_modes_switch_as_the_model_s_own_train_does(kind, recipe):
    model, x = kind(), torch.randn(4, 4) if kind is AlwaysDropping else torch.randn(2, 3, 8, 8)
    gm = s2a_fx.transform(model, x, recipe)
    for graph in (gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        for training in (True, False, True):
            torch.manual_seed(0)
            expected = model.train(training)(x)
            torch.manual_seed(0)
            torch.testing.assert_close(graph.train(training)(x), expected)
            assert all(torch.equal(b, graph.get_buffer(name)) for name, b in model.named_buffers())
    assert s2a_fx.analyze(gm, x).saved_bytes == measure_saved_bytes(gm, (x,))
