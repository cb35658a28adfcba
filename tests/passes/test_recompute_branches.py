"""RecomputeBranches: which branches it replaces, what they keep, what is left alone and what is refused."""

import pytest
import torch
from slow import fast
from small_models import small_model
from steps import layers
from torch import nn

import s2a_fx
from s2a_fx.analysis.measure import measure_saved_bytes
from s2a_fx.codecs.rows import Rows
from s2a_fx.graph.metadata import notes_of
from s2a_fx.passes import FreezeWeights, RecomputeBranches

BRANCHES = {"vit": (3, 3), "swin": (5, 5), "convnext": (0, 5), "resnet": (0, 0)}
"""How many branches have an attention, and how many none."""


def residual(width, *body):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(width)
            self.body = nn.Sequential(*body)

        def forward(self, x):
            return x + self.body(self.norm(x))

    return nn.Sequential(nn.Linear(width, width), Residual())


def test_each_kind_is_replaced(family):
    attention, mlp = BRANCHES[family]
    for kinds, count in ((("attention",), attention), (("mlp",), mlp), (("attention", "mlp"), attention + mlp)):
        model, x = small_model(family)
        gm = s2a_fx.transform(model, x, (RecomputeBranches(kinds=kinds),))
        assert len(layers(gm, "RecomputedBranch")) == count


def test_only_branches_as_narrow_as_asked():
    model, x = small_model("swin")
    gm = s2a_fx.transform(model, x, (RecomputeBranches(widest=64),))
    assert len(layers(gm, "RecomputedBranch")) == 4


@pytest.mark.parametrize("bits", fast([1, 6], 6))
def test_predicted_bytes_equal_bytes_held_by_autograd(family, bits):
    model, x = small_model(family)
    gm = s2a_fx.transform(model, x, (RecomputeBranches(bits=bits),))
    assert s2a_fx.analyze(gm, x).saved_bytes == measure_saved_bytes(gm, (x,))


def test_a_branch_keeps_its_codes_a_number_a_row_and_one_a_channel_of_an_image():
    model, x = residual(64, nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)), torch.randn(4, 20, 64)
    model[0].requires_grad_(False)  # what lies before keeps nothing of its own
    gm = s2a_fx.transform(model, x, (RecomputeBranches(bits=6),))
    assert s2a_fx.analyze(gm, x).saved_bytes == Rows(6).nbytes(80, 64) + 80 * 2 + 4 * 64


def test_the_model_it_came_from_is_left_as_it_is(vit):
    model, x = vit
    before = measure_saved_bytes(model, (x,))
    s2a_fx.transform(model, x, (RecomputeBranches(),))
    assert measure_saved_bytes(model, (x,)) == before
    assert not layers(model, "RecomputedBranch")


def test_a_model_without_norm_branches_is_left_alone():
    model, x = small_model("resnet")
    result = RecomputeBranches()(s2a_fx.trace(model, x))
    assert not result.modified
    assert torch.equal(result.graph_module.eval()(x), model.eval()(x))


def test_branches_that_keep_nothing_are_left_alone_with_a_reason(vit):
    gm = s2a_fx.transform(*vit, (FreezeWeights(keep=("head",)), RecomputeBranches()))
    assert not layers(gm, "RecomputedBranch")
    assert {note.reason for note in notes_of(gm)} == {"keeps nothing: no gradient flows through it"}
    assert len(notes_of(gm)) == 6


def test_channels_that_cannot_be_packed_are_left_alone_with_a_reason():
    model = residual(12, nn.Linear(12, 48), nn.GELU(), nn.Linear(48, 12))
    gm = s2a_fx.transform(model, torch.randn(4, 10, 12), (RecomputeBranches(),))
    assert not layers(gm, "RecomputedBranch")
    assert [note.reason for note in notes_of(gm)] == ["12 channels are not a multiple of 8: codes could not be packed"]


def test_parts_are_as_large_as_asked():
    model, x = residual(64, nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)), torch.randn(4, 1000, 64)
    images = {}
    for part_mb in (0, 1, 3):
        gm = s2a_fx.transform(model, x, (RecomputeBranches(part_mb=part_mb),))
        images[part_mb] = layers(gm, "RecomputedBranch")[0].images
    assert images == {0: 0, 1: 1, 3: 2}  # 1.024 MB an image; never less than one image


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 0},
        {"bits": 9},
        {"bits": True},
        {"bits": 2.5},
        {"kinds": ("mpl",)},
        {"kinds": "attention"},
        {"kinds": ()},
        {"widest": -1},
        {"widest": "64"},
        {"part_mb": -1},
    ],
    ids=str,
)
def test_bad_options_are_refused(options):
    with pytest.raises(s2a_fx.InputError):
        RecomputeBranches(**options)
