"""One graph for both modes: a checkpoint of one mode stays one checkpoint, whatever differs inside it."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

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
