"""Fixtures over the small models. Fused operators run uncompiled, for speed: `test_fusion.py` compiles some."""

import os

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # threads of several workers would wait for each other's cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))
os.environ.setdefault("PYTHONFAULTHANDLER", "1")  # processes that tests start tell where they crashed
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
