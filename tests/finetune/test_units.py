"""Blocks as modules that are called: the same function, under the same names."""

import subprocess
import sys

import pytest
from slow import fast
from small_models import SMALL, small_model
from steps import assert_same

import s2a_fx
from s2a_fx.finetune.units import make_units
from s2a_fx.graph.structure import residual_blocks

SHARDS = """
import torch, torch.distributed as dist
from small_models import small_model
from torch.distributed.tensor import DTensor
import s2a_fx
from s2a_fx.graph.structure import residual_blocks
from s2a_fx.finetune.distributed import Processes, shared
dist.init_process_group("gloo")
model, x = small_model("vit")
gm = s2a_fx.transform(model, x, "s2a")
blocks = [block.path for block in residual_blocks(s2a_fx.trace(model, x))]
called = shared(gm, Processes(dist.get_rank(), 2, parallel="fsdp"), blocks)
first, *_, last = gm.get_submodule("fsdp_units")
here = lambda unit: not any(isinstance(p, DTensor) for p in unit.parameters())
seen = []
*_, inside = (m for m in last.modules() if type(m).__name__ == "RecomputedBranch")
inside.register_forward_hook(lambda *_: seen.append((here(first), here(last))))
called(x).sum().backward()
assert seen == [(False, True)], seen
assert all(p.grad is None for p in gm.parameters() if not p.requires_grad)
dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    "recipe", ["s2a-max", *(pytest.param(r, marks=pytest.mark.slow) for r in ("full", "bias+checkpoint", "s2a"))]
)
@pytest.mark.parametrize("family", fast(SMALL, "vit", "convnext"))
def test_a_model_in_units_is_the_same_model(family, recipe):
    model, x = small_model(family)
    plain, cut = (s2a_fx.transform(model, x, recipe) for _ in range(2))
    names = [name for name, _ in cut.named_parameters()]
    cut.load_state_dict(plain.state_dict())
    blocks = residual_blocks(s2a_fx.trace(model, x))
    assert len(make_units(cut, [block.path for block in blocks])) == len(blocks)
    assert [name for name, _ in cut.named_parameters()] == names
    assert_same(cut, plain, x)


@pytest.mark.slow
def test_one_block_at_a_time_is_gathered(tmp_path, monkeypatch):
    (tmp_path / "shards.py").write_text(SHARDS)
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "shards.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
