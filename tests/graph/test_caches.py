"""What models keep for the whole process holds no fake tensors after a trace."""

import functools

import pytest
import torch
from torch import nn

import s2a_fx
from s2a_fx.analysis.measure import measure_saved_bytes


@functools.lru_cache(maxsize=4)
def positions(count):
    return torch.arange(count) / count


def cached_inside(function):
    cached = functools.cache(function)

    @functools.wraps(function)
    def call(*args):
        return cached(*args)

    return call


@cached_inside
def scales(count):
    return torch.linspace(0.5, 1.5, count)


class ByName(nn.Module):
    def forward(self, x):
        return x * positions(x.shape[1])


class Inside(nn.Module):
    def forward(self, x):
        return x * scales(x.shape[1])


class ByMethod(nn.Module):
    @functools.cache  # noqa: B019
    def offsets(self, count):
        return torch.ones(count)

    def forward(self, x):
        return x + self.offsets(x.shape[1])


@pytest.mark.parametrize("kind", [ByName, Inside, ByMethod])
def test_caches_hold_no_fake_tensors(kind):
    model, x = nn.Sequential(nn.Linear(4, 8), kind(), nn.Linear(8, 3)), torch.randn(2, 4)
    gm = s2a_fx.transform(model, x, "bias")
    assert s2a_fx.analyze(gm, x).saved_bytes == measure_saved_bytes(gm, (x,))
    assert type(positions(8)) is type(scales(8)) is torch.Tensor
    assert torch.equal(gm(x), model(x))
    model(x).sum().backward()


def test_caches_stand_as_before():
    before = positions(5)
    function = positions
    s2a_fx.analyze(nn.Sequential(nn.Linear(4, 5), ByName()), torch.randn(2, 4))
    assert positions is function
    assert positions(5) is before
