"""Accuracy on a split: the model comes back as it was, and what cannot be counted is refused."""

import pytest
import torch
from torch import nn

import s2a_fx
from s2a_fx.finetune import evaluate

X, TARGETS = torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])


def norm_and_head():
    return nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Dropout(), nn.Linear(12, 3))


@pytest.mark.parametrize("targets", [TARGETS, TARGETS + 1], ids=["to the end", "to an error"])
@pytest.mark.parametrize("frozen", [0, 2], ids=["norm", "dropout"])
def test_each_module_is_left_in_the_mode_that_it_came_in(targets, frozen):
    model = norm_and_head().train()
    model[frozen].eval()
    before = [m.training for m in model.modules()]
    try:
        evaluate(model, [(X, targets)], 3)
    except s2a_fx.InputError:
        assert targets is not TARGETS
    assert [m.training for m in model.modules()] == before


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([], "batches: got none"),
        ([(X, TARGETS + 3)], "got class 5, wanted 0 to 2"),
        ([(X, TARGETS - 1)], "got class -1, wanted 0 to 2"),
        ([(X, torch.zeros(4, 3))], "wanted one class index"),
    ],
)
def test_what_cannot_be_counted_is_refused(batches, words):
    with pytest.raises(s2a_fx.InputError, match=words):
        evaluate(norm_and_head(), batches, 3)
