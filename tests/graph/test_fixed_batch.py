"""Models that count their images: right for the batch that was traced, and told for others."""

import copy
import pickle

import pytest
import torch
from torch import nn

import s2a_fx
from s2a_fx.analysis.measure import measure_saved_bytes
from s2a_fx.graph.metadata import notes_of

X, LARGER = torch.randn(3, 8), torch.randn(5, 8)


class Model(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.layer, self.head, self.function = nn.Linear(8, 8), nn.Linear(8, 3), function

    def forward(self, x):
        return self.head(self.function(self, x))


def loops_over_images(self, x):
    return torch.stack([self.layer(x[i]) for i in range(x.size(0))])


def unpacks_images(self, x):
    first, *others = x.unbind(0)
    return self.layer(first) + sum(others)


def counts_chunks(self, x):
    return torch.cat([chunk * (i + 1) for i, chunk in enumerate(self.layer(x).chunk(x.shape[0]))])


def looks_up_its_size(self, x):
    return self.layer(x) * {x.shape[0]: 2.0, 8: 3.0}[8] * sum(x.shape)


def branches_on_many(self, x):
    return self.layer(x) * (2 if x.shape[0] > 4 else 3)


def branches_on_very_many(self, x):
    return self.layer(x) * (2 if x.shape[0] > 4 and x.shape[0] < 100 else 3)


COUNTING = [branches_on_very_many, loops_over_images, unpacks_images, counts_chunks, looks_up_its_size, branches_on_many]


@pytest.mark.parametrize("function", COUNTING)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda gm: pickle.loads(pickle.dumps(gm))], ids=["copied", "pickled"])
def test_another_batch_is_refused_where_the_model_counts(function, copied):
    model = Model(function)
    gm = s2a_fx.transform(model, X, "bias")
    for graph in (gm, copied(gm)):
        assert torch.equal(graph(X), model(X))
        with pytest.raises(s2a_fx.ShapeError, match="got a batch of 5, and this graph is for batches of 3"):
            graph(LARGER)
    assert s2a_fx.analyze(gm, X).saved_bytes == measure_saved_bytes(gm, (X,))
    assert any("for batches of 3" in note.reason for note in notes_of(gm))
    with pytest.raises(s2a_fx.InputError, match="for batches of 3"):
        s2a_fx.analyze(gm, LARGER)
    assert torch.equal(s2a_fx.trace(model, LARGER)(LARGER), model(LARGER))


@pytest.mark.parametrize("condition", [lambda n: n < 3, lambda n: n > 100, lambda n: n == 2, lambda n: n % 2 == 0])
def test_a_branch_on_other_batches_is_found(condition):
    model = Model(lambda self, x: self.layer(x) * (2 if condition(x.shape[0]) else 3))
    gm = s2a_fx.trace(model, X)
    for count in (2, 3, 4, 101):
        x = torch.randn(count, 8)
        try:
            found = gm(x)
        except s2a_fx.ShapeError:
            assert count != 3
        else:
            assert torch.equal(found, model(x))


def takes_the_first_few(self, x):
    return self.layer(x)[: min(x.shape[0], 4)]


def branches_on_its_width(self, x):
    return self.layer(x).relu() if x.shape[1] == 8 else x


@pytest.mark.parametrize("function", [takes_the_first_few, branches_on_its_width])
def test_a_model_that_only_reads_sizes_takes_any_batch(function):
    model = Model(function)
    gm = s2a_fx.trace(model, X)
    for x in (X, LARGER, X[:2]):
        assert torch.equal(gm(x), model(x))


@pytest.mark.parametrize("function", [takes_the_first_few, branches_on_its_width])
def test_one_image_stands_for_any_number(function):
    model = Model(function)
    gm = s2a_fx.trace(model, X[:1])
    for x in (X[:1], X, LARGER):
        assert torch.equal(gm(x), model(x))


def test_a_model_of_one_image_is_for_one():
    model = Model(lambda self, x: self.layer(x.squeeze(0)) if x.shape[0] == 1 else self.layer(x) * 2)
    gm = s2a_fx.trace(model, X[:1])
    assert torch.equal(gm(X[:1]), model(X[:1]))
    with pytest.raises(s2a_fx.ShapeError, match="for batches of 1"):
        gm(X)
