"""What a model reads of the device of its tensors, the graph reads again: it may be moved after it was captured."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import s2a_fx

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3])


class Model(nn.Module):
    """Two layers; `function` is what it computes, on a way that torch.fx cannot follow if `by_dynamo`."""

    def __init__(self, function, by_dynamo):
        super().__init__()
        self.function, self.by_dynamo = function, by_dynamo
        self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x, labels=None):
        if self.by_dynamo and x.shape[0] < 2:
            return self.head(x)
        logits = self.function(self, x)
        return logits if labels is None else (logits, F.cross_entropy(logits, labels.to(logits.device)))


def positions(self, x):
    return self.head(self.layer(x) + torch.arange(8, device=x.device, dtype=x.dtype))


def made_like_a_parameter(self, x):
    return self.head(self.layer(x) * torch.linspace(0, 1, 8, device=self.layer.weight.device))


def moved(self, x):
    return self.head((self.layer(x) + torch.ones(8, device=x.device)).to(device=x.device, dtype=torch.float32))


def made_on_the_model_s_device(self, x):
    device = next(self.parameters()).device
    return self.head(self.layer(x) + torch.arange(8, device=device) + torch.zeros(len(x), 8, device=device))


def nothing(self, x):
    return self.head(self.layer(x))


@pytest.mark.parametrize("by_dynamo", [False, True], ids=["torch.fx", "Dynamo"])
@pytest.mark.parametrize("labels", [(), (LABELS,)], ids=["", "labels"])
@pytest.mark.parametrize("function", [positions, made_like_a_parameter, made_on_the_model_s_device, moved, nothing])
def test_a_moved_graph_computes_where_it_is(function, labels, by_dynamo):
    model = Model(function, by_dynamo)
    gm = s2a_fx.transform(model, (X, *labels), "bias")
    expected = model(X, *labels)
    for here in (copy.deepcopy(gm), pickle.loads(pickle.dumps(gm)), gm):
        assert all(a.equal(b) for a, b in zip(tuple(here(X, *labels)), tuple(expected), strict=True))
        results = here.to("meta")(*(value.to("meta") for value in (X, *labels)))
        assert {v.device.type for v in (results if labels else [results])} == {"meta"}


class Products(TorchDispatchMode):
    """Writes down in which precision matrices are multiplied."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.addmm.default,):
            self.found.append(args[-1].dtype)
        return func(*args, **(kwargs or {}))


def test_autocast_is_switched_off_for_the_device_of_the_operands():
    def in_full_precision(self, x):
        with torch.autocast(device_type=x.device.type, enabled=False):
            y = self.layer(x)
        return self.head(y)

    model = Model(in_full_precision, by_dynamo=True)
    gm = s2a_fx.trace(model, (X,))
    with torch.autocast("cpu", torch.bfloat16):
        assert gm(X).equal(model(X))
    with FakeTensorMode(allow_non_fake_inputs=True):  # of a GPU that need not be there
        there, x = copy.deepcopy(gm), torch.empty(4, 8, device="cuda")
        for module in there.modules():
            for name, parameter in [*module.named_parameters(recurse=False)]:
                setattr(module, name, nn.Parameter(torch.empty_like(parameter, device="cuda")))
        torch.set_autocast_enabled("cuda", True)
        try:
            with Products() as seen:
                there(x)
        finally:
            torch.set_autocast_enabled("cuda", False)
    assert seen.found == [torch.float32, torch.get_autocast_dtype("cuda")]
