"""`torch.compile(model, backend="s2a")`: the passes on Dynamo's graph."""

import copy

import pytest
import torch
import torch.nn.functional as F
from saved_bytes import cosine
from slow import fast
from small_models import SMALL, small_model
from steps import ten_steps
from torch._dynamo.utils import counters

import s2a_fx
from s2a_fx.analysis.measure import measure_saved_bytes
from s2a_fx.passes import CompressActivations, FuseAttention, RecomputeBranches

EVERYTHING = (FuseAttention(), CompressActivations(smallest=0))
FAMILIES = fast(SMALL, "vit")
INNER = fast(["aot_eager", "eager", "inductor"], "aot_eager")


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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("inner", INNER)
def test_losses_and_saved_bytes_are_those_of_the_eager_passes(family, inner):
    model, x = tuned(family)
    eager = s2a_fx.transform(copy.deepcopy(model), x, EVERYTHING)
    compiled = torch.compile(model, backend="s2a", options={"passes": EVERYTHING, "inner": inner}, fullgraph=True)
    torch.testing.assert_close(ten_steps(compiled, x, 3e-4)[:5], ten_steps(eager, x, 3e-4)[:5], rtol=1e-4, atol=0)
    graphs = counters["stats"]["unique_graphs"]
    compiled(x).sum().backward()
    assert counters["stats"]["unique_graphs"] == graphs  # no step compiles again
    assert not counters["graph_break"]
    if inner != "inductor":  # it adds copies of weights, in channels-last order
        assert measure_saved_bytes(compiled, (x,)) <= 1.05 * measure_saved_bytes(eager, (x,))


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
        ({"inner": "cudagraphs"}, "got inner='cudagraphs', wanted inner to be one of inductor, aot_eager, eager"),
        ({"bits": 9}, "bits must be an integer from 1 to 8, got 9"),
        ({"bits": 4, "passes": EVERYTHING}, "got bits and passes"),
        ({"passes": "s2b"}, "unknown recipe 's2b'"),
    ],
)
def test_wrong_options_are_told(options, message):
    compiled = torch.compile(torch.nn.Linear(8, 8), backend="s2a", options=options)
    with pytest.raises(Exception, match=message):
        compiled(torch.randn(2, 8))


@pytest.mark.slow
def test_fewer_bits_keep_fewer_bytes():
    kept = []
    for bits in (2, 4, 8):
        model, x = tuned("vit")
        images = torch.randn(16, *x.shape[1:])  # large enough to be worth a code
        compiled = torch.compile(model, backend="s2a", options={"inner": "eager", "bits": bits})
        compiled(images)
        kept.append(measure_saved_bytes(compiled, (images,)))
    assert kept[0] < kept[1] < kept[2]


def through_a_view(x):
    h = x.clone()
    h[:, :2].mul_(5.0)
    return F.gelu(h)


def into_another(x):
    h = torch.empty_like(x)
    torch.mul(x, 3.0, out=h)
    return F.gelu(h)


def activated_in_place(x):
    h = x * 2
    F.relu_(h)
    return F.gelu(h)


def dropped_in_place(x):
    h = x * 2
    F.dropout(h, 1.0, True, True)
    return F.gelu(h)


def into_the_input(x):
    y = F.gelu(x)
    x.mul_(2)
    return y


class Averaging(torch.nn.Module):
    """Writes into its buffers one after the other, with keywords, and into an argument called `out`; nobody reads the results."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        self.register_buffer("mean", torch.ones(8))
        self.register_buffer("last", torch.ones(4, 8))

    def forward(self, x):
        y = F.gelu(self.linear(x))
        self.mean.mul_(0.9).add_(y.detach().mean(0), alpha=0.1)
        torch.mul(x, 3.0, out=self.last)
        return y


class Apart(torch.nn.Module):
    """Adds its bias later than a linear layer would."""

    def __init__(self, both=False):
        super().__init__()
        self.linear, self.both = torch.nn.Linear(8, 8), both

    def forward(self, x):
        weight, bias = self.linear.weight, self.linear.bias
        return F.gelu(F.linear(x, weight, bias if self.both else None) + F.linear(x, weight)) + bias


@pytest.mark.parametrize("model", [Averaging(), Apart(), Apart(both=True)], ids=["averaging", "apart", "both"])
def test_a_modules_own_tensors_are_used_as_it_uses_them(model):
    reference, x = copy.deepcopy(model), torch.randn(4, 8)
    compiled = torch.compile(model, backend="s2a", options={"inner": "eager", "passes": EVERYTHING}, fullgraph=True)
    torch.testing.assert_close(compiled(x), reference(x))
    torch.testing.assert_close(dict(model.named_buffers()), dict(reference.named_buffers()))


@pytest.mark.parametrize("write", [through_a_view, into_another, activated_in_place, dropped_in_place, into_the_input])
def test_writes_in_place_are_kept(write):
    layer = torch.nn.Linear(8, 8)

    def model(x):
        return write(layer(x) if write is not into_the_input else x) + layer(x)

    x = torch.randn(4, 8)
    with torch.no_grad() if write is into_another else torch.enable_grad():
        expected, wanted = model(given := x.clone()), given
        compiled = torch.compile(model, backend="s2a", options={"inner": "eager", "passes": EVERYTHING}, fullgraph=True)
        torch.testing.assert_close(compiled(given := x.clone()), expected)
    torch.testing.assert_close(given, wanted)


def test_two_models_in_one_graph_keep_their_own_weights():
    first, second, x = torch.nn.Sequential(torch.nn.Linear(8, 8)), torch.nn.Sequential(torch.nn.Linear(8, 8)), torch.randn(4, 8)

    def both(x):
        return F.gelu(first(x)) + F.gelu(second(x))

    compiled = torch.compile(both, backend="s2a", options={"inner": "eager", "passes": EVERYTHING}, fullgraph=True)
    torch.testing.assert_close(compiled(x), both(x))


def test_one_weight_with_two_options():
    weight, x = torch.nn.Parameter(torch.randn(4, 4, 3, 3)), torch.randn(2, 4, 8, 8)

    def model(x):
        return F.gelu(F.conv2d(x, weight, None, 1, 1) + F.conv2d(x, weight, None, 1, 2, 2))

    compiled = torch.compile(model, backend="s2a", options={"inner": "eager", "passes": EVERYTHING}, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


class Lora(torch.nn.Linear):
    def __init__(self):
        super().__init__(8, 8)
        self.down, self.up = torch.nn.Linear(8, 2, bias=False), torch.nn.Linear(2, 8, bias=False)

    def forward(self, x):
        return super().forward(x) + self.up(self.down(x))


def test_a_layer_with_layers_of_its_own():
    model, x = torch.nn.Sequential(Lora(), torch.nn.GELU()), torch.randn(4, 8)
    compiled = torch.compile(model, backend="s2a", options={"inner": "eager", "passes": EVERYTHING}, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


def test_blocks_compiled_one_by_one_share_a_graph_and_no_weights():
    model, x = tuned("vit")
    reference = copy.deepcopy(model)
    exact = gradients(reference, reference, x)
    passes = (FuseAttention(), RecomputeBranches(bits=8), CompressActivations(8, 8, 8, smallest=0))
    for block in model.blocks:
        block.compile(backend="s2a", options={"inner": "eager", "passes": passes})
    assert cosine(gradients(model, model, x), exact) > 0.999


def test_a_number_that_changes_is_compiled_as_it_is():
    model, x = torch.nn.Linear(8, 8), torch.randn(4, 8)
    compiled = torch.compile(lambda x, k: F.gelu(model(x)) * k, backend="s2a", options={"inner": "eager"})
    for k in (1, 2, 3):
        torch.testing.assert_close(compiled(x, k), F.gelu(model(x)) * k)
