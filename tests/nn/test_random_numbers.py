"""What draws random numbers is seen in what it calls, not in what its attributes are called."""

import pytest
import torch
from torch import nn

import s2a_fx
from s2a_fx.graph.leaf import only_drops, only_rearranges
from s2a_fx.nn.coded import CodedDropout
from s2a_fx.nn.quantized import QuantizedSoftmaxMatmul
from s2a_fx.nn.random_numbers import may_draw


class GeneralizedMean(nn.Module):
    """A pooling with a power p, one call to a trace, as it reads its mode."""

    def __init__(self):
        super().__init__()
        self.p = 3.0

    def forward(self, x):
        if self.training:
            x = x.clamp(min=1e-6)
        return x.pow(self.p).mean(1, keepdim=True).pow(1 / self.p)


class Smoothed(nn.Module):
    """An option that is called dropout, and drops nothing at random."""

    dropout = 0.1

    def forward(self, x):
        return x * (1 - self.dropout) if self.training else x


class Noise(nn.Module):
    sigma = 0.1

    def forward(self, x):
        return x + self.sigma * torch.randn_like(x) if self.training else x


class DropPath(nn.Module):
    """As models copy it from each other."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if self.rate == 0 or not self.training:
            return x
        return x.div(1 - self.rate) * x.new_empty((x.shape[0], 1, 1)).bernoulli_(1 - self.rate)


class TokenMask(nn.Module):
    """Fewer tokens in training, chosen by random numbers."""

    def forward(self, x):
        return x * (torch.rand(x.shape[:2], device=x.device).argsort(1) > 1).unsqueeze(-1) if self.training else x


@pytest.mark.parametrize(
    ("module", "draws"),
    [
        (GeneralizedMean(), False),
        (Smoothed(), False),
        (Noise(), True),
        (TokenMask(), True),
        (DropPath(0.2), True),
        (DropPath(0.0), False),
        (nn.Dropout(0.2), True),
        (nn.Dropout(0.0), False),
        (nn.RReLU(), True),
        (nn.LSTM(8, 8, num_layers=2, dropout=0.5), True),
        (CodedDropout(0.2), True),
        (CodedDropout(0.0), False),
        (nn.AvgPool1d(1), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_module_draws_if_its_forward_does(module, draws):
    gm = s2a_fx.trace(nn.Sequential(nn.Linear(8, 8), module), torch.randn(2, 4, 8))
    (node,) = (node for node in gm.graph.nodes if node.target == "1")
    assert may_draw(gm, node) is draws
    module.eval()
    assert may_draw(gm, node) is draws  # as it will train
    assert not module.training


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_a_quantized_map_says_whether_it_draws(rate):
    assert QuantizedSoftmaxMatmul(rate).draws() is (rate > 0)


def test_what_a_leaf_does_is_seen_in_its_calls():
    gm = s2a_fx.trace(nn.Sequential(DropPath(0.2), Noise(), nn.Flatten(), GeneralizedMean()), torch.randn(2, 4, 8))
    nodes = [node for node in gm.graph.nodes if node.op == "call_module"]
    assert [only_drops(gm, node) for node in nodes] == [True, False, False, False]
    assert [only_rearranges(gm, node) for node in nodes] == [False, False, True, False]
