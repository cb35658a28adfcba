"""What is dropped is freed: no module, fake tensor, or source of generated code stays."""

import collections
import gc
import linecache
from contextlib import suppress

import pytest
import torch
from slow import fast
from small_models import small_model
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor

import s2a_fx
from s2a_fx.analysis.saved import saved_tensors
from s2a_fx.analysis.simulation import simulate

X = torch.randn(2, 8)
KINDS = (nn.Module, FakeTensor, torch.UntypedStorage, fx.Node)


def alive():
    """What a process could gather without end: objects by kind, and the sources that torch.fx keeps."""
    gc.collect()
    types = [type(o) for o in gc.get_objects()]
    found = collections.Counter(t.__name__ for t in types if issubclass(t, KINDS) or str(t.__module__).startswith("s2a_fx."))
    return found + collections.Counter(sources=len(fx.graph_module._loader.eval_cache) + len(linecache.cache))


class Masks(nn.Module):
    """Reads a value: no graph follows it."""

    def forward(self, x):
        return x[x.sum(1) > 0] if x.sum() > 0 else x


class Softmaxes(nn.Module):
    """Autograd keeps the results of its operators."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.softmax(torch.tanh(self.layer(x)), -1).exp())


def refused(run, *args, **options):
    with suppress(s2a_fx.S2AError):
        run(*args, **options)
        raise AssertionError("it was not refused")


CALLS = {
    "trace": lambda model, x: s2a_fx.trace(model, x),
    "analyze": lambda model, x: s2a_fx.analyze(model, x),
    "transform": lambda model, x: s2a_fx.transform(model, x, "s2a"),
    "compare": lambda model, x: s2a_fx.compare(model, x, ["full", "bias+compress"]),
    "saved_tensors": lambda model, x: saved_tensors(s2a_fx.trace(model, x)),
    "simulate": lambda model, x: simulate(s2a_fx.trace(model, x), forward_only=True),
    "finalize": lambda model, x: s2a_fx.finalize(s2a_fx.transform(model, x, "bias").eval()),
    "a loss that is no number": lambda model, x: refused(s2a_fx.analyze, model, x, loss=lambda y: y),
    "another number of channels": lambda model, x: refused(s2a_fx.analyze, model, x[:, 1:]),
    "a pass that fails": lambda model, x: refused(s2a_fx.transform, model, x, (lambda gm: None,)),
    "a model that no graph follows": lambda model, x: refused(s2a_fx.analyze, nn.Sequential(model, Masks()), x),
}
MODELS = {
    "vit": lambda: small_model("vit", depth=1, img_size=32),
    "resnet": lambda: small_model("resnet"),
    "softmaxes": lambda: (Softmaxes(), X),
}


@pytest.mark.parametrize("name", fast(MODELS, "vit"))
@pytest.mark.parametrize("call", fast(CALLS, "transform"))
def test_nothing_is_left_of_a_call(call, name):
    model, x = MODELS[name]()
    x = x[..., :32, :32] if name == "vit" else x
    if name == "softmaxes" and call == "transform":
        pytest.skip("no residual blocks")
    CALLS[call](model, x)  # caches fill
    before = alive()
    for _ in range(2):
        CALLS[call](model, x)
    assert alive() - before == collections.Counter()
