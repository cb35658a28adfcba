"""Codes for what a compiled step saves, put in by hooks and by a partitioner: no pass, no rewritten model."""

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from saved_bytes import cosine
from small_models import small_model
from steps import ten_steps
from torch import nn
from torch._dynamo.utils import counters

from s2a_fx.errors import InputError
from s2a_fx.inductor import CodingPartitioner, SavedCodec, saved_tensor_hooks

WEIGHT_COPIES = 600_000  # Inductor keeps the patch embedding's weight in channels-last order, too


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()


class Hooked(nn.Module):
    """A model that is compiled, and called, inside the hooks."""

    def __init__(self, model, **options):
        super().__init__()
        self.model = model
        self.compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        self.options = options

    def forward(self, x):
        with saved_tensor_hooks(**self.options):
            return self.compiled(x)


def partitioned(model, *options):
    return torch.compile(model, fullgraph=True, options={"custom_partitioner_fn": CodingPartitioner(*options)})


def kept_by(output, model):
    """Bytes of the storages that the compiled backward holds, weights left out."""
    weights = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    storages = [t.untyped_storage() for t in output.grad_fn.saved_tensors if t is not None]
    return sum({s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in weights}.values())


def gradients(module, model, x):
    model.zero_grad()
    F.cross_entropy(module(x), torch.arange(len(x))).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vit", "convnext"])
def test_hooks_keep_codes_in_one_graph(family):
    model, x = small_model(family)
    reference = copy.deepcopy(model)
    hooked = Hooked(model, bits=8, smallest=0)
    assert cosine(gradients(hooked, model, x), gradients(reference, reference, x)) > 0.9999
    assert kept_by(hooked(x), model) < 0.4 * kept_by(torch.compile(reference, backend="aot_eager")(x), reference)
    graphs = counters["stats"]["unique_graphs"]
    torch.testing.assert_close(ten_steps(hooked, x, 1e-3)[:5], ten_steps(reference, x, 1e-3)[:5], rtol=2e-3, atol=0)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vit", "convnext"])
def test_a_partitioner_keeps_codes_under_inductor(family):
    model, x = small_model(family)
    reference = copy.deepcopy(model)
    module = partitioned(model, 8, 0)
    assert cosine(gradients(module, model, x), gradients(reference, reference, x)) > 0.9999
    assert kept_by(module(x), model) < 0.45 * kept_by(torch.compile(reference, backend="aot_eager")(x), reference) + WEIGHT_COPIES
    torch.testing.assert_close(ten_steps(module, x, 1e-3)[:5], ten_steps(reference, x, 1e-3)[:5], rtol=2e-3, atol=0)


def test_small_tensors_are_left_alone(vit):
    model, x = vit
    reference = copy.deepcopy(model)
    hooked = Hooked(model, bits=1, smallest=1 << 30)
    torch.testing.assert_close(gradients(hooked, model, x), gradients(reference, reference, x))


def test_a_tensor_comes_back_in_its_own_layout():
    codec = SavedCodec(8, smallest=0)
    for x in (torch.randn(2, 8, 16), torch.randn(2, 16, 8).mT, torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last)):
        y = codec.unpack(codec.pack(x))
        assert y.shape == x.shape
        assert y.stride() == x.stride()
        torch.testing.assert_close(y, x, rtol=0, atol=0.03)


@pytest.mark.parametrize("x", [torch.arange(64), torch.randn(63), torch.randn(1, 64).expand(64, 64)])
def test_what_codes_do_not_serve_is_kept_as_it_is(x):
    codec = SavedCodec(8, smallest=0)
    assert codec.unpack(codec.pack(x)) is x


def test_a_uuid_covers_the_options():
    uuids = [CodingPartitioner(*options).uuid() for options in [(8,), (4,), (8, 0), (8,)]]
    assert uuids[0] == uuids[3]
    assert len(set(uuids)) == 3


@pytest.mark.parametrize("options", [{"bits": 9}, {"bits": 4.0}, {"smallest": -1}])
def test_wrong_options_are_told(options):
    with pytest.raises(InputError):
        saved_tensor_hooks(**options)


def test_an_older_torch_is_told(monkeypatch):
    monkeypatch.setattr("s2a_fx.inductor.get_hash_for_files", None)
    with pytest.raises(InputError, match="has no custom_partitioner_fn: take torch"):
        CodingPartitioner()
    monkeypatch.delattr("torch._functorch._aot_autograd.utils.saved_tensors_hooks_are_inlineable")
    with pytest.raises(InputError, match="has no inlined hooks: take torch"):
        saved_tensor_hooks()


STEP = """
import sys, torch
from torch import nn
from torch._dynamo.utils import counters
from s2a_fx.inductor import CodingPartitioner, saved_tensor_hooks
way, bits = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
model, x = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 8)), torch.randn(32, 64)
if way == "backend":
    for layer in model: layer.requires_grad_(isinstance(layer, nn.GELU))
    x.requires_grad_()
    from s2a_fx.passes import CompressActivations
    options = {"passes": (CompressActivations(activation_bits=bits, norm_bits=bits, smallest=0),)}
    y = torch.compile(model, backend="s2a", options=options)(x)
elif way == "hooks":
    with saved_tensor_hooks(bits=bits, smallest=0):
        y = torch.compile(model)(x)
else:
    y = torch.compile(model, options={"custom_partitioner_fn": CodingPartitioner(bits, 0)})(x)
weights = {p.data_ptr() for p in [*model.parameters(), x]}
print(sum(t.nbytes for t in y.grad_fn.saved_tensors if t.data_ptr() not in weights))
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", ["backend", "hooks", "partitioner"])
def test_another_option_never_meets_a_cached_graph(way, tmp_path):
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}

    def kept(bits):
        command = [sys.executable, "-c", STEP, way, str(bits)]
        return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()[-1])

    eight = kept(8)
    four = kept(4)
    assert four < eight
    assert kept(8) == eight  # and the same option keeps the same, from the cache
