"""Fixtures over the small models."""

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
