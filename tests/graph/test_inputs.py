"""Example inputs as pytrees: a graph module is called, and answers, as its model."""

import copy
import inspect
import io
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BatchFeature, ResNetConfig, ResNetForImageClassification
from transformers.modeling_outputs import ImageClassifierOutput

import s2a_fx
from s2a_fx import InputError, Inputs
from s2a_fx.graph.inputs import Signature, Structure

X = torch.randn(3, 4)
Y = torch.tensor([0, 1, 2])


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, saved], ids=["itself", "deepcopy", "torch.save"])


@dataclass
class Pair:
    """No pytree knows it."""

    first: torch.Tensor
    second: torch.Tensor | None


Named = namedtuple("Named", "logits loss")


class Takes(nn.Module):
    """Takes what the test gives in any form."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 5)

    def forward(self, *args, **kwargs):
        leaves = Structure.of((args, kwargs))[0]
        return self.layer(sum(leaf for leaf in leaves if leaf is not None))


@pytest.mark.parametrize(
    ("given", "args", "kwargs", "names"),
    [
        (X, (X,), {}, ("args_0",)),
        ((X, X), (X, X), {}, ("args_0", "args_1")),
        ([X, None, 3], (X, None, 3), {}, ("args_0",)),
        ({"pixel_values": X, "mask": None}, (), {"pixel_values": X, "mask": None}, ("pixel_values",)),
        (BatchFeature({"pixel_values": X}), (), {"pixel_values": X}, ("pixel_values",)),
        (
            ({"image": X, "size": 4}, [X, (X,)]),
            ({"image": X, "size": 4}, [X, (X,)]),
            {},
            ("args_0_image", "args_1_0", "args_1_1_0"),
        ),
        (Inputs(X, other=X), (X,), {"other": X}, ("args_0", "other")),
        ((Pair(X, None),), (Pair(X, None),), {}, ("args_0_first",)),
        (Inputs(**{"class": X}), (), {"class": X}, ("class_",)),
        ({"batch": {"image": X, "1 mask": X}}, (), {"batch": {"image": X, "1 mask": X}}, ("batch_image", "batch_1_mask")),
        ({"2": X, "_2": X}, (), {"2": X, "_2": X}, ("_2", "_2_")),
    ],
)
@COPIES
def test_inputs_of_any_form(given, args, kwargs, names, copied):
    model = Takes()
    gm = copied(s2a_fx.trace(model, given))
    assert tuple(node.target for node in gm.graph.find_nodes(op="placeholder")) == names
    assert torch.equal(gm(*args, **kwargs), model(*args, **kwargs))
    assert s2a_fx.analyze(gm, given).saved_bytes == 3 * 4 * 4 == s2a_fx.analyze(model, given).saved_bytes


class Answers(nn.Module):
    """Answers in the form that the test wants."""

    def __init__(self, form):
        super().__init__()
        self.layer = nn.Linear(4, 5)
        self.form = form

    def forward(self, x, labels=None):
        logits = self.layer(x)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return FORMS[self.form](logits, loss)


FORMS = {
    "ModelOutput": lambda logits, loss: ImageClassifierOutput(loss=loss, logits=logits),
    "dict": lambda logits, loss: {"logits": logits} | ({} if loss is None else {"loss": loss}),
    "tuple": lambda logits, loss: (logits,) if loss is None else (loss, logits),
    "NamedTuple": Named,
    "dataclass": Pair,
    "nested": lambda logits, loss: {"logits": [logits, 3, None], "pair": Pair(logits, loss)},
}


def assert_same(one, other):
    (ours, structure), (theirs, another) = Structure.of(one), Structure.of(other)
    assert structure == another
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(ours, theirs, strict=True))
    assert type(one) is type(other)


@pytest.mark.parametrize("form", FORMS)
@COPIES
def test_results_of_any_form_with_an_optional_argument_and_without(form, copied):
    model = Answers(form)
    gm = copied(s2a_fx.trace(model, {"x": X, "labels": Y}))
    for training in (True, False):
        gm.train(training)
        assert_same(gm(X, labels=Y), model(X, labels=Y))
        assert_same(gm(X, Y), model(X, Y))
        assert_same(gm(x=X), model(x=X))


@pytest.mark.parametrize("labels", [{}, {"labels": Y}], ids=["without", "with"])
def test_compiled_calls_are_one_graph(labels):
    gm = s2a_fx.trace(Answers("ModelOutput"), {"x": X, "labels": Y})
    compiled = torch.compile(gm, fullgraph=True, backend="eager")
    assert_same(compiled(X, **labels), gm(X, **labels))


def test_the_signature_is_the_model_s():
    gm = s2a_fx.trace(Answers("dict"), X)
    assert list(inspect.signature(gm.forward).parameters) == ["x", "labels"]
    assert inspect.signature(gm.forward).parameters["labels"].default is None


def test_plain_tensors_leave_the_code_plain():
    class Plain(nn.Module):
        def forward(self, x, y):
            return x + y

    code = s2a_fx.trace(Plain(), (X, X)).code
    assert "def forward(self, x, y):" in code and "_signature" not in code and "_result" not in code


def test_interpreter_takes_leaves():
    model = Answers("dict")
    gm = s2a_fx.trace(model, {"x": X, "labels": Y})
    assert_same(torch.fx.Interpreter(gm).run(X, Y), model(X, Y))


def test_a_batch_of_another_size():
    model = Answers("ModelOutput")
    gm = s2a_fx.trace(model, {"x": X, "labels": Y})
    assert_same(gm(torch.cat([X, X]), torch.cat([Y, Y])), model(torch.cat([X, X]), torch.cat([Y, Y])))


class Masked(nn.Module):
    """Needs the mask for all that it returns."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, mask=None, *, scale=1.0):
        x = self.layer(x) * scale
        return (x if mask is None else x + mask).relu()


@pytest.mark.parametrize(
    ("example", "args", "kwargs", "message"),
    [
        ((X,), (X,), {"mask": X}, "mask: the graph was captured with x alone; to give it, pass what you will call it with"),
        (
            (X, X),
            (X,),
            {},
            "mask: is missing; the graph was captured with x, mask. To leave it out, pass what you will",
        ),
        (Inputs(X, scale=2.0), (X,), {}, "scale: got 1.0, the graph was captured with 2.0; pass what you will call it with"),
        (Inputs(X, scale=2.0), (X,), {"scale": 3.0}, "scale: got 3.0, the graph was captured with 2.0"),
        ((X,), (X,), {"scale": 3.0}, "scale: the graph was captured with x alone"),
        ((X,), ("image",), {}, "x: got str, the graph was captured with a tensor"),
        ((X,), ([X],), {}, "x: got another structure"),
    ],
)
@COPIES
def test_a_call_that_the_capture_did_not_see_is_refused(example, args, kwargs, message, copied):
    gm = copied(s2a_fx.trace(Masked(), example))
    with pytest.raises(InputError) as refusal:
        gm(*args, **kwargs)
    assert str(refusal.value).startswith(message)


def test_defaults_may_be_given():
    model = Masked()
    gm = s2a_fx.trace(model, X)
    assert torch.equal(gm(X, None, scale=1.0), model(X))
    with_mask = s2a_fx.trace(model, (X, X))
    assert torch.equal(with_mask(X, mask=X), model(X, X))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((), "wanted tensors"),
        (None, "got NoneType, wanted a tensor"),
        ({"x": "image"}, "got str, wanted tensors"),
        ({"mask": X}, r"also needs x"),
        ({"x": X, "maks": X}, r"takes \(x, mask=None, \*, scale=1.0\).*maks"),
        ((X, X, X), r"takes \(x, mask=None, \*, scale=1.0\).*too many"),
        ((X, X.to("meta")), None),
    ],
)
def test_example_inputs_are_checked_at_the_door(inputs, message):
    if message is None:  # a meta tensor stands for one of any device
        assert Signature.of(Masked(), inputs)[0].names == ("x", "mask")
        return
    with pytest.raises(InputError, match=message):
        s2a_fx.trace(Masked(), inputs)


def test_hugging_face_model_with_labels():
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    model = ResNetForImageClassification(config)
    images = torch.randn(3, 3, 32, 32)
    gm = s2a_fx.trace(model, {"pixel_values": images, "labels": Y})
    model.eval()
    gm.eval()
    assert_same(gm(pixel_values=images, labels=Y), model(pixel_values=images, labels=Y))
    assert_same(gm(pixel_values=images), model(pixel_values=images))
    assert_same(gm(images, Y), model(images, Y))
    assert gm.config.num_labels == 3 and gm.main_input_name == "pixel_values" and gm.device == model.device
