"""`torch.compile(model, backend="s2a")`: the passes on Dynamo's graph."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from saved_bytes import cosine
from small_models import small_model
from steps import ten_steps
from torch._dynamo.utils import counters

import s2a_fx
from s2a_fx.analysis.measure import measure_saved_bytes
from s2a_fx.passes import CompressActivations, FuseAttention

EVERYTHING = (FuseAttention(), CompressActivations(smallest=0))
INNER = ["aot_eager", pytest.param("eager", marks=pytest.mark.slow), pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()


def tuned(family):
    """A model whose biases and head train, as the user froze it, and its images."""
    model, x = small_model(family)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("bias" in name or "head" in name or name.startswith("fc"))
    return model, x


def gradients(module, model, x):
    torch.manual_seed(0)
    model.zero_grad()
    F.cross_entropy(module(x), torch.arange(len(x)) % 5).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("inner", INNER)
def test_losses_and_saved_bytes_are_those_of_the_eager_passes(family, inner):
    model, x = tuned(family)
    eager = s2a_fx.transform(copy.deepcopy(model), x, EVERYTHING)
    compiled = torch.compile(model, backend="s2a", options={"passes": EVERYTHING, "inner": inner}, fullgraph=True)
    torch.testing.assert_close(ten_steps(compiled, x, 1e-3), ten_steps(eager, x, 1e-3), rtol=1e-4, atol=0)
    graphs = counters["stats"]["unique_graphs"]
    compiled(x).sum().backward()
    assert counters["stats"]["unique_graphs"] == graphs  # no step compiles again
    assert not counters["graph_break"]
    if inner != "inductor":  # it adds copies of weights, in channels-last order
        assert measure_saved_bytes(compiled, (x,)) <= 1.05 * measure_saved_bytes(eager, (x,))


def test_one_more_graph_serves_every_batch():
    model, x = tuned("vit")
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend="s2a", options={"inner": "aot_eager"}, fullgraph=True)
    seen = []
    for batch in (2, 3, 4, 5):
        images = torch.randn(batch, *x.shape[1:])
        exact = gradients(reference, reference, images)
        assert cosine(gradients(compiled, model, images), exact) > 0.99
        seen.append(counters["stats"]["unique_graphs"])
    assert seen[1:] == [seen[1]] * 3
    assert seen[1] == 2 * seen[0]  # the graph that Dynamo sees, and the one the passes made of it


def test_autocast_and_accumulated_gradients():
    model, x = tuned("resnet")
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend="s2a", options={"inner": "aot_eager", "passes": EVERYTHING}, fullgraph=True)
    for module in (compiled, reference):
        for _ in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(module(x), torch.arange(len(x)))
            loss.backward()
    pairs = [(p.grad, q.grad) for p, q in zip(model.parameters(), reference.parameters(), strict=True) if q.grad is not None]
    assert cosine(torch.cat([p.flatten() for p, _ in pairs]), torch.cat([q.flatten() for _, q in pairs])) > 0.99
    torch.testing.assert_close(model.bn1.running_mean, reference.bn1.running_mean)
    assert model.bn1.num_batches_tracked == reference.bn1.num_batches_tracked == 2


def test_evaluation_is_the_models_own():
    model, x = tuned("vit")
    compiled = torch.compile(model, backend="s2a", options={"inner": "eager"}, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
    model.eval()
    with torch.inference_mode():
        assert torch.equal(compiled(x), model(x))


def test_new_weights_are_seen():
    model, x = tuned("vit")
    compiled = torch.compile(model, backend="s2a", options={"inner": "eager"}, fullgraph=True)
    compiled(x)
    model.head.bias = torch.nn.Parameter(torch.full_like(model.head.bias, 100.0))
    torch.testing.assert_close(compiled(x), model(x))


def test_parameters_that_peft_adds_train():
    peft = pytest.importorskip("peft")
    model, x = small_model("vit")
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["qkv"], modules_to_save=["head"]))
    exact = gradients(tuned, tuned, x)
    compiled = torch.compile(tuned, backend="s2a", options={"inner": "aot_eager", "passes": EVERYTHING})
    assert cosine(gradients(compiled, tuned, x), exact) > 0.99


class Counting(torch.nn.Module):
    """Writes into a buffer whose new value nobody reads in the same forward, and draws in place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x):
        self.calls.add_(1)
        noise = x.new_empty(x.shape).bernoulli_(0.5)
        noise.div_(0.5)
        return F.gelu(self.linear(x * noise))


def test_what_is_written_in_place_is_kept():
    model = Counting()
    x = torch.randn(4, 8)
    compiled = torch.compile(model, backend="s2a", options={"inner": "eager", "passes": EVERYTHING}, fullgraph=True)
    torch.manual_seed(0)
    y = compiled(x)
    torch.manual_seed(0)
    torch.testing.assert_close(y, model(x))
    assert model.calls == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bit": 4}, "unknown option bit; options are bits, inner, passes"),
        ({"inner": "cudagraphs"}, "got inner='cudagraphs', wanted one of inductor, aot_eager, eager"),
        ({"bits": 9}, "9"),
    ],
)
def test_wrong_options_are_told(options, message):
    compiled = torch.compile(torch.nn.Linear(8, 8), backend="s2a", options=options)
    with pytest.raises(Exception, match=message):
        compiled(torch.randn(2, 8))


def test_fewer_bits_keep_fewer_bytes():
    kept = []
    for bits in (2, 4, 8):
        model, x = tuned("vit")
        passes = (CompressActivations(activation_bits=bits, norm_bits=bits, attention_bits=bits, smallest=0),)
        compiled = torch.compile(model, backend="s2a", options={"inner": "eager", "passes": passes})
        compiled(x)
        kept.append(measure_saved_bytes(compiled, (x,)))
    assert kept == sorted(kept)
    assert math.isfinite(kept[0]) and kept[0] < kept[2]
