"""What is written on a graph survives copies and pickles."""

import copy
import io
import pickle

import pytest
import timm
import torch
from slow import fast
from small_models import SMALL, small_model
from torch import fx, nn

import s2a_fx
from s2a_fx.graph.metadata import add_note, base_parameters, notes_of, record_of
from s2a_fx.graph.provenance import module_stack
from s2a_fx.tasks.origin import origin_of


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled(module):
    return pickle.loads(pickle.dumps(module))


COPIES = pytest.mark.parametrize(
    "copied",
    [
        pytest.param(copy.deepcopy, id="deepcopy", marks=pytest.mark.slow),
        pytest.param(pickled, id="pickle", marks=pytest.mark.slow),
        pytest.param(saved, id="save", marks=pytest.mark.slow),
        pytest.param(lambda m: pickled(copy.deepcopy(saved(m))), id="all"),
    ],
)


@COPIES
@pytest.mark.parametrize("family", fast(SMALL, "vit"))
@pytest.mark.parametrize("recipe", ["s2a", "bias+checkpoint"])
def test_reports_of_copies_are_equal(family, recipe, copied):
    model, x = small_model(family)
    gm = s2a_fx.transform(model, x, recipe)
    ours, theirs = s2a_fx.analyze(gm, x), s2a_fx.analyze(copied(gm), x)
    assert ours.trainable_percent == theirs.trainable_percent < 60
    assert ours.notes == theirs.notes
    assert (ours.saved_bytes, ours.peak.bytes) == (theirs.saved_bytes, theirs.peak.bytes)
    assert ours.saved == theirs.saved


@COPIES
def test_records_of_copies_are_equal_and_apart(copied):
    model, x = small_model("vit")
    gm = s2a_fx.transform(model, x, "s2a")
    other = copied(gm)
    ours, theirs = record_of(gm), record_of(other)
    assert (ours.base_parameters, ours.notes, ours.report_from) == (theirs.base_parameters, theirs.notes, theirs.report_from)
    assert origin_of(other) == origin_of(gm) != None  # noqa: E711
    assert origin_of(gm).model == "vit_tiny_patch16_224"
    assert ours.signature.names == theirs.signature.names
    add_note(other, "test", "", "the copy's own")
    assert notes_of(other) == (*notes_of(gm), notes_of(other)[-1])


@COPIES
@pytest.mark.parametrize("family", fast(SMALL, "vit"))
def test_a_copy_takes_further_passes(family, copied):
    model, x = small_model(family)
    direct = s2a_fx.transform(s2a_fx.trace(model, x), x, "s2a")
    through = s2a_fx.transform(copied(s2a_fx.trace(model, x)), x, "s2a")
    assert [(n.op, str(n.target)) for n in direct.graph.nodes] == [(n.op, str(n.target)) for n in through.graph.nodes]
    assert s2a_fx.analyze(direct, x).saved == s2a_fx.analyze(through, x).saved


@COPIES
def test_nodes_keep_their_modules(vit, copied):
    gm = s2a_fx.trace(*vit)
    assert [module_stack(n) for n in copied(gm).graph.nodes] == [module_stack(n) for n in gm.graph.nodes]


def test_an_unpickled_graph_is_analysed_at_another_batch_size():
    model, x = timm.create_model("resnet10t", num_classes=4), torch.randn(4, 3, 64, 64)
    gm = s2a_fx.transform(model, x, "bias+checkpoint")
    more = torch.randn(8, 3, 64, 64)
    assert s2a_fx.analyze(pickled(gm), more).saved_bytes == s2a_fx.analyze(gm, more).saved_bytes


def test_the_origin_counts_the_passes_of_each_transform():
    model, x = small_model("vit")
    once = s2a_fx.transform(model, x, "bias")
    twice = s2a_fx.transform(pickled(once), x, "bias+compress")
    assert origin_of(model) is None
    assert origin_of(twice).passes[: len(origin_of(once).passes)] == origin_of(once).passes
    assert len(origin_of(twice).passes) > len(origin_of(once).passes)


def test_a_graph_of_someone_else_is_left_as_it_is():
    gm = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    s2a_fx.transform(gm, torch.randn(2, 4), "full")
    assert (notes_of(gm), base_parameters(gm)) == ((), 20)
    assert not gm.meta


def test_hooks_and_attributes_of_one_s_own_are_copied(vit):
    gm = s2a_fx.trace(*vit)
    seen = []
    gm.register_forward_hook(lambda *_: seen.append(1))
    gm.run_name = "first"
    twin = copy.deepcopy(gm)
    twin(vit[1])
    assert seen and twin.run_name == "first"
