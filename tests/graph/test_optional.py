"""Arguments that a call may leave out: what depends on them alone is left out with them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import s2a_fx

X, LABELS, START, END = torch.randn(3, 4), torch.tensor([0, 1, 2]), torch.randn(2), torch.randn(2)


class Losses(nn.Module):
    """Two losses; the one writes to a buffer, the other needs two arguments; a dropout stands between them."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x, labels=None, start=None, end=None):
        y = self.body(x)
        out = {}
        if labels is not None:
            with torch.no_grad():
                self.seen.add_(labels.sum())
            out["loss"] = F.cross_entropy(y.view(-1, 5), labels.view(-1))
        z = self.head(F.dropout(y, 0.5, self.training))
        if start is not None and end is not None:
            out["span"] = F.mse_loss(z.sum(), start.sum()) + F.dropout(end, 0.5, self.training).sum()
        out["logits"] = z
        return out


CALLS = {
    "all": {"labels": LABELS, "start": START, "end": END},
    "one": {"labels": LABELS},
    "the others": {"start": START, "end": END},
    "one of two": {"labels": LABELS, "end": END},
    "none": {},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_each_set_of_arguments_computes_what_the_model_does(call, training):
    model = Losses().train(training)
    gm = s2a_fx.trace(model, {"x": X, **CALLS["all"]})
    gm.seen = gm.seen.clone()  # a graph shares the model's buffers
    torch.manual_seed(2)
    expected = model(X, **CALLS[call])
    torch.manual_seed(2)
    actual = {name: value for name, value in gm(X, **CALLS[call]).items() if value is not None}
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert gm.seen == model.seen


def test_gradients_are_the_model_s():
    model = Losses().eval()
    gm = s2a_fx.trace(model, {"x": X, **CALLS["all"]})
    for call in CALLS.values():
        for module in (model, gm):
            module.zero_grad()
            sum(value.sum() for value in module(X, **call).values() if value is not None).backward()
        for (name, p), q in zip(model.named_parameters(), gm.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad) if p.grad is not None else q.grad is None, name


def test_analysis_counts_what_depends_on_the_argument():
    model, example = Losses(), {"x": X, "labels": LABELS}
    with_labels = s2a_fx.analyze(model, example).saved_bytes
    assert with_labels > s2a_fx.analyze(model, {"x": X}).saved_bytes


class Overlapping(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 5)

    def forward(self, x, labels=None, weight=None):
        y = self.layer(x)
        if labels is None:
            return y
        losses = F.cross_entropy(y, labels, reduction="none")
        return y, (losses if weight is None else losses * weight).mean()


def test_an_argument_that_changes_another_s_result_is_required():
    model = Overlapping()
    gm = s2a_fx.trace(model, (X, LABELS, torch.rand(3)))
    with pytest.raises(s2a_fx.InputError, match="weight: is missing"):
        gm(X, LABELS)


class TrainsBeside(nn.Module):
    """The auxiliary head is read in train mode, with labels, alone."""

    def __init__(self):
        super().__init__()
        self.body, self.aux = nn.Linear(4, 5), nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.5))

    def forward(self, x, labels=None):
        y = self.body(x)
        if labels is None:
            return {"logits": y}
        return {"logits": y, "loss": F.cross_entropy(self.aux(y), labels)}


def test_layers_that_are_read_with_the_argument_alone_belong_to_the_graph():
    model = TrainsBeside()
    gm = s2a_fx.trace(model, (X, LABELS))
    assert list(gm.state_dict()) == list(model.state_dict())
    assert not any(m.training for m in gm.eval().modules())
    torch.testing.assert_close(gm(X, LABELS), model.eval()(X, LABELS), rtol=0, atol=0)
    twin = copy.deepcopy(gm).double()
    assert twin(X.double(), LABELS)["loss"].dtype == torch.float64


def test_a_graph_is_analysed_with_all_that_it_was_captured_with():
    gm = s2a_fx.trace(TrainsBeside(), (X, LABELS))
    with pytest.raises(s2a_fx.InputError, match="labels: is missing; the graph was captured with x, labels"):
        s2a_fx.analyze(gm, X)
