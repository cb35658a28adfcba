"""What a model changes besides its buffers, and sets for the process: refused with the line, and left as it was."""

import collections
import contextlib
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import manual_seed, nn
from torch._subclasses.fake_tensor import FakeTensor

import s2a_fx
from s2a_fx.graph.calls import find_calls

X = torch.randn(3, 8)
OUTSIDE = torch.zeros(8)


class Keeps(nn.Module):
    """A layer, what `function` keeps beside it, and its forward."""

    def __init__(self, function, kept=None):
        super().__init__()
        self.layer, self.function, self.kept = nn.Linear(8, 8), function, kept

    def forward(self, x):
        return self.function(self, x)


def adds_to_a_plain_tensor(self, x):
    self.kept += 1
    return self.layer(x) * self.kept


def adds_to_a_tensor_in_a_list(self, x):
    self.kept[0].add_(1)
    return self.layer(x) * self.kept[0]


def adds_to_a_tensor_of_the_file(self, x):
    OUTSIDE.add_(1)
    return self.layer(x) + OUTSIDE


@pytest.mark.parametrize(
    ("function", "kept"),
    [
        (adds_to_a_plain_tensor, torch.zeros(8)),
        (adds_to_a_tensor_in_a_list, [torch.zeros(8)]),
        (adds_to_a_tensor_of_the_file, None),
    ],
)
def test_a_write_that_outlives_the_call_is_refused_before_it_is_done(function, kept):
    line = function.__code__.co_firstlineno + 1
    with pytest.raises(s2a_fx.TraceError, match=rf"line {line} of .*test_lasting_state.py: writes to a tensor that outlives"):
        s2a_fx.trace(Keeps(function, kept), X)
    assert not OUTSIDE.any()


def counts(self, x):
    self.kept += 1
    return self.layer(x) * self.kept


def reads_the_last(self, x):
    y = self.layer(x)
    y = y if self.kept is None else y + self.kept
    self.kept = y.detach().mean(0)
    return y


def sums_the_last_two(self, x):
    self.kept.append(self.layer(x))
    return sum(self.kept[-2:])


@pytest.mark.parametrize(("function", "kept"), [(counts, 0), (reads_the_last, None), (sums_the_last_two, [])])
def test_what_the_next_call_computes_with_is_refused_by_its_name(function, kept):
    with pytest.raises(s2a_fx.TraceError, match=r"the model itself \(Keeps\): keeps 'kept' from one call for the next"):
        s2a_fx.trace(Keeps(function, kept), X)


def counts_deep_inside(self, x):
    self.kept["n"][0] += 1
    return self.layer(x) * self.kept["n"][0]


def counts_in_an_object(self, x):
    self.kept.n += 1
    return self.layer(x) * self.kept.n


def writes_by_out(self, x):
    torch.add(OUTSIDE, 1, out=OUTSIDE)
    return self.layer(x) + OUTSIDE


def catches_its_refusal(self, x):
    with contextlib.suppress(Exception):
        OUTSIDE.add_(1)
    return self.layer(x)


@pytest.mark.parametrize(
    ("function", "kept", "text"),
    [
        (counts_deep_inside, {"n": [0]}, "keeps 'kept'"),
        (counts_in_an_object, SimpleNamespace(n=0), "keeps 'kept'"),
        (writes_by_out, None, "writes to a tensor that outlives"),
        (catches_its_refusal, None, "writes to a tensor that outlives"),
    ],
)
def test_what_lasts_is_found_however_deep(function, kept, text):
    with pytest.raises(s2a_fx.TraceError, match=text):
        s2a_fx.trace(Keeps(function, kept), X)
    assert not OUTSIDE.any()


def fills_a_cache(self, x):
    if "bias" not in self.kept:
        self.kept["bias"] = self.layer.weight.sum(0) * 2
    return self.layer(x) + self.kept["bias"].detach()


def test_a_cache_of_what_would_be_computed_again_is_no_hindrance():
    model = Keeps(fills_a_cache, {})
    gm = s2a_fx.trace(model, X)
    torch.testing.assert_close(gm(X), model(X))
    assert s2a_fx.trace(timm.create_model("levit_128s", num_classes=3), torch.randn(2, 3, 224, 224))


def notes_its_map(self, x):
    self.kept, self.size = self.layer(x).relu(), tuple(x.shape)
    return self.layer(self.kept)


def test_what_is_only_noted_is_no_hindrance():
    model = Keeps(notes_its_map)
    assert torch.equal(s2a_fx.trace(model, X)(X), model(X))


def seeds(self, x):
    torch.manual_seed(11)
    return self.layer(x) + torch.rand(8)


def seeds_and_restores(self, x):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        noise = torch.rand_like(x)
    return self.layer(x + noise)


def seeds_by_a_name_of_its_own(self, x):
    manual_seed(11)
    return self.layer(x) + torch.rand(8)


def catches_the_seed(self, x):
    with contextlib.suppress(Exception):
        torch.manual_seed(11)
    return self.layer(x) + torch.rand(8)


def restores(self, x):
    with torch.random.fork_rng(devices=[]):
        noise = torch.rand_like(x)
    return self.layer(x + noise)


@pytest.mark.parametrize("function", [seeds, seeds_and_restores, restores, seeds_by_a_name_of_its_own, catches_the_seed])
def test_a_model_that_sets_the_generator_is_refused_and_the_generator_is_as_before(function):
    model = Keeps(function)
    state, seed = torch.get_rng_state(), torch.manual_seed
    with pytest.raises(s2a_fx.TraceError, match=r"line \d+ of .*test_lasting_state.py: sets the state of torch's generator"):
        s2a_fx.trace(model, X)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.manual_seed is seed


def replaces_data(self, x):
    self.layer.weight.data = F.normalize(self.layer.weight.data)
    return self.layer(x)


def test_other_data_of_a_parameter_is_refused():
    with pytest.raises(s2a_fx.TraceError, match=r"the model writes to layer\.weight"):
        s2a_fx.trace(Keeps(replaces_data), X)


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_of_gradients_are_refused_by_the_parameter_s_name(register):
    model = nn.Sequential(nn.Linear(8, 8))
    getattr(model[0].weight, register)(lambda _: None)
    with pytest.raises(s2a_fx.TraceError, match=r"0\.weight: has a hook on its gradient"):
        s2a_fx.trace(model, X)


def test_attributes_of_parameters_are_those_of_the_model():
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight.scale_of_rate = 2.0
    assert s2a_fx.trace(model, X).get_parameter("0.weight").scale_of_rate == 2.0


def test_a_buffer_called_as_an_attribute_of_graph_modules_is_written_by_the_graph_alone():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.meta = nn.Linear(8, 8), nn.Buffer(torch.zeros(8))

        def forward(self, x):
            self.meta.add_(1)
            return self.layer(x) + self.meta

    model = Writes()
    gm = s2a_fx.trace(model, X)
    assert not model.meta.any()
    assert torch.equal(gm(X), model.layer(X) + 1)
    assert torch.equal(model.meta, torch.ones(8))


@pytest.mark.parametrize("ask", [s2a_fx.analyze, s2a_fx.trace, lambda m, x: s2a_fx.transform(m, x, "bias")])
def test_a_spectral_norm_is_not_iterated(ask):
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ask(model, X)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_lazy_layers_are_refused_by_name():
    with pytest.raises(s2a_fx.InputError, match=r"0 \(LazyLinear\): has no weights yet"):
        s2a_fx.trace(nn.Sequential(nn.LazyLinear(3)), X)


@pytest.mark.parametrize("result", [lambda y: {y}, lambda y: iter([y])])
def test_results_that_are_no_structure_are_refused(result):
    with pytest.raises(s2a_fx.S2AError):
        s2a_fx.trace(Keeps(lambda self, x: result(self.layer(x))), X)


def test_calls_of_one_mode_are_found():
    gm = s2a_fx.trace(Keeps(lambda self, x: self.layer(x) if self.training else self.layer(x).relu()), X)
    assert len(find_calls(gm, F.relu)) == 1
    with pytest.raises(s2a_fx.InputError, match="got a Linear, wanted a graph module"):
        find_calls(nn.Linear(8, 8), F.relu)


@pytest.mark.parametrize("make", [lambda: None, dict, collections.OrderedDict, SimpleNamespace])
def test_what_an_opaque_layer_fills_at_its_first_call_is_no_hindrance(make):
    @register_notrace_module
    class Filling(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", None, persistent=False)
            self.own = make()

        def forward(self, x):
            held = vars(self.own) if isinstance(self.own, SimpleNamespace) else self._buffers if self.own is None else self.own
            if held.get("table") is None:
                held["table"] = torch.ones(x.shape[-1])
            return x * held["table"]

    model = nn.Sequential(nn.Linear(8, 8), Filling())
    assert torch.equal(s2a_fx.trace(model, X)(X), model(X))


def test_values_of_plain_tensors_share_no_memory_with_the_graph_s():
    gm = s2a_fx.trace(Keeps(lambda self, x: self.layer(x - self.kept), torch.rand(8)), X)
    (constant,) = (n for n in gm.graph.nodes if n.op == "get_attr" and "layer" not in n.target)
    assert isinstance(constant.meta["val"], FakeTensor)
