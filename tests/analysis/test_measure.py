"""Measuring on real tensors."""

import gc
import weakref

import torch
from torch import nn

from s2a_fx.analysis.measure import measure_saved_bytes


def test_a_measured_model_can_be_freed():
    """A node that keeps its own output must not keep itself alive through the hooks, and with it graph and weights."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Softmax(-1), nn.Linear(8, 8))
    weight = weakref.ref(model[0].weight.untyped_storage())
    assert measure_saved_bytes(model, (torch.randn(4, 8),)) > 0
    del model
    gc.collect()
    assert weight() is None
