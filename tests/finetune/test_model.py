"""The weights that a run begins with, from a hub that is not asked."""

from pathlib import Path

import pytest
import timm
import torch

from s2a_fx.errors import InputError
from s2a_fx.finetune import FinetuneOptions
from s2a_fx.finetune.model import build_model

HUB = "timm.models._builder.load_state_dict_from_hf"
OPTIONS = FinetuneOptions(model="resnet10t", data=Path("images"), pretrained=True)


@pytest.fixture
def published(monkeypatch):
    """A whole model, whose weights the hub has."""
    model = timm.create_model("resnet10t")
    monkeypatch.setattr(HUB, lambda *location, **settings: model.state_dict())
    return model


def test_pretrained_weights_come_with_a_head_of_zeros_for_other_classes(published):
    model, new = build_model(OPTIONS, classes=3)
    assert new == ("fc.weight", "fc.bias")
    assert not model.fc.weight.any() and model.fc.weight.shape[0] == 3
    own = {name: t for name, t in model.state_dict().items() if name not in new}
    assert all(torch.equal(t, published.state_dict()[name]) for name, t in own.items())


def test_pretrained_weights_keep_their_head_for_as_many_classes(published):
    model, new = build_model(OPTIONS, classes=1000)
    assert new == ()
    assert torch.equal(model.fc.weight, published.fc.weight)


def test_a_prediction_asks_no_hub(monkeypatch):
    monkeypatch.setattr(HUB, pytest.fail)
    build_model(OPTIONS, classes=3, weights=False)


def test_a_hub_that_cannot_be_reached_is_told_with_what_to_do(monkeypatch):
    def unreachable(*location, **settings):
        raise OSError("no route to host")

    monkeypatch.setattr(HUB, unreachable)
    with pytest.raises(InputError, match=r"resnet10t: its weights cannot be had from the hub: no route to host.*--checkpoint"):
        build_model(OPTIONS, classes=3)
