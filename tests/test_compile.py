"""Rewritten modules under torch.compile: one graph, the gradients of eager mode, and codes kept."""

import copy

import pytest
import torch
import torch.nn.functional as F
from saved_bytes import cosine
from slow import fast
from small_models import small_model
from steps import ten_steps
from torch._dynamo.utils import counters

import s2a_fx
from s2a_fx.analysis.measure import measure_saved_bytes
from s2a_fx.passes import CompressActivations, FuseAttention
from s2a_fx.recipes import BIAS_LRP_LSB

EVERYTHING = (*BIAS_LRP_LSB, FuseAttention(), CompressActivations(smallest=0))


def gradients(module, gm, x):
    torch.manual_seed(0)
    gm.zero_grad()
    F.cross_entropy(module(x), torch.arange(x.shape[0]) % 5).backward()
    return torch.cat([p.grad.flatten() for p in gm.parameters() if p.grad is not None])


@pytest.mark.parametrize("recipe", fast(["s2a", EVERYTHING, "s2a-max"], "s2a"), ids=["s2a", "everything", "s2a-max"])
def test_one_graph_has_the_gradients_of_eager_mode(vit, recipe):
    model, x = vit
    gm = s2a_fx.transform(model, x, recipe)
    exact = gradients(gm, gm, x)
    compiled = torch.compile(gm, fullgraph=True, backend="aot_eager")
    assert cosine(gradients(compiled, gm, x), exact) > 0.99999
    assert measure_saved_bytes(compiled, (x,)) <= 1.05 * measure_saved_bytes(gm, (x,))


@pytest.mark.slow
def test_five_steps_of_inductor_have_the_losses_of_eager_mode(family):
    # Later steps tell codes that round the other way, in float64, too.
    model, x = small_model(family)
    gm = s2a_fx.transform(model, x, "s2a")
    other = copy.deepcopy(gm)
    compiled = torch.compile(gm, fullgraph=True)
    torch.testing.assert_close(ten_steps(compiled, x, 1e-3)[:5], ten_steps(other, x, 1e-3)[:5], rtol=1e-4, atol=0)


@pytest.mark.slow
def test_one_more_graph_serves_every_batch(vit):
    model, x = vit
    gm = s2a_fx.transform(model, x, "s2a")
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(gm, fullgraph=True, backend="aot_eager")
    for batch in (2, 2, 3, 4, 5):
        gradients(compiled, gm, torch.randn(batch, *x.shape[1:]))
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_autocast_is_seen(name):
    model, x = small_model(name)
    gm = s2a_fx.transform(model, x, "s2a")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        exact = gm(x)
        compiled = torch.compile(gm, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, exact, rtol=0.05, atol=0.05)
    assert compiled.dtype == exact.dtype == torch.bfloat16


@pytest.mark.slow
def test_what_draws_is_compiled_as_it_is():
    model, x = small_model("vit", proj_drop_rate=0.5, depth=1)
    torch.manual_seed(1)
    gm = s2a_fx.transform(model, x, "s2a-max")
    torch.manual_seed(1)  # both begin with the same prompts and side branch
    plain = s2a_fx.transform(model, x, "bias+lrp+lsb")
    compiled = [torch.compile(m, fullgraph=True, backend="aot_eager") for m in (gm, plain)]
    found, exact = (gradients(c, m, x) for c, m in zip(compiled, (gm, plain), strict=True))
    assert cosine(found, exact) > 0.98  # with another mask in the backward it would be far less
