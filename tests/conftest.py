"""Fixtures over the small models. Fused operators run uncompiled, for speed: `test_fusion.py` compiles some."""

import os

os.environ.setdefault("S2A_FX_COMPILE", "0")  # read when s2a_fx is imported

import pytest
import torch
from small_models import SMALL, small_model
from torch import nn


@pytest.fixture(params=SMALL)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def vit() -> tuple[nn.Module, torch.Tensor]:
    return small_model("vit")
