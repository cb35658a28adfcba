"""What is predicted of a run's memory, against what is measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from colours import SMALL, small_run

from s2a_fx.analysis.measure import measure_peak_bytes, measure_saved_bytes
from s2a_fx.analyze import compare
from s2a_fx.finetune.distributed import Processes
from s2a_fx.finetune.free_memory import free_bytes, left_in_cgroups
from s2a_fx.finetune.memory import predict
from s2a_fx.finetune.model import batch_norms, build_model
from s2a_fx.finetune.objective import make_loss, make_optimizer
from s2a_fx.transform import transform

X = torch.randn(8, 3, 32, 32)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "adamw", "lion"])
def test_of_the_optimizer_that_is_used(optimizer, tmp_path):
    options = small_run(tmp_path, tmp_path, recipe="full", optimizer=optimizer, model_options=SMALL)
    gm = transform(build_model(options, 3)[0], X, "full").train()
    loss = make_loss(options)
    measured = measure_peak_bytes(gm, (X,), make_optimizer(gm, options), lambda output: loss(output, torch.zeros(8).long()))
    assert predict(options, 3, Processes()).peak_bytes == pytest.approx(measured, rel=0.005)


@pytest.mark.parametrize("recipe", ["bias", "s2a"])
def test_of_batch_norms_that_keep_their_statistics(recipe, tmp_path):
    options = small_run(tmp_path, tmp_path, model="resnet10t", recipe=recipe, freeze_batch_norm=True, model_options={})
    model, _ = build_model(options, 3)
    gm = transform(model, X, recipe).train()
    for path in batch_norms(model):
        gm.get_submodule(path).eval()
    assert predict(options, 3, Processes()).report.saved_bytes == measure_saved_bytes(gm, (X,))


@pytest.mark.slow
def test_of_a_compiled_step(tmp_path):
    options = small_run(tmp_path, tmp_path, recipe="full", compile=True, model_options=SMALL)
    found = predict(options, 3, Processes())
    (expected,) = compare(build_model(options, 3)[0].train(), X, ["full"], modes=["compile"]).reports
    assert found.report.saved_bytes == expected.saved_bytes
    assert "an upper estimate" in str(found)


@pytest.mark.parametrize(("device", "told"), [("cuda", True), ("cpu", False)])
def test_a_low_estimate_is_called_one(device, told, tmp_path):
    options = small_run(tmp_path, tmp_path, amp="bfloat16", model_options=SMALL)
    assert ("a low estimate" in str(predict(options, 3, Processes(device=torch.device(device))))) is told


TWO = """
import json, sys
from pathlib import Path
import torch
sys.path.append(sys.argv[1])
from colours import SMALL, small_run
from s2a_fx.graph.structure import residual_blocks
from s2a_fx.analysis.measure import measure_peak_bytes
from s2a_fx.finetune.distributed import joined, shared, without_sync
from s2a_fx.finetune.memory import predict
from s2a_fx.finetune.model import build_model
from s2a_fx.finetune.objective import make_loss, make_optimizer
from s2a_fx.graph.capture import trace
from s2a_fx.transform import transform
size = {"depth": 6, "embed_dim": 192, "num_heads": 3}
accumulation = int(sys.argv[4])
options = small_run(Path(), Path(), recipe=sys.argv[3], batch_size=2, model_options=size, grad_accumulation=accumulation)
x, loss = torch.randn(2, 3, 32, 32), make_loss(options)

class Added(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        for last in [False] * (accumulation - 1) + [True]:
            with without_sync(self.inner, not last):
                output = self.inner(x)
                if not last:
                    cost(output).backward()
        return output

def cost(output):
    return loss(output, torch.zeros(2).long())

with joined("cpu", sys.argv[2]) as processes:
    model = build_model(options, 3)[0]
    blocks = [block.path for block in residual_blocks(trace(model, x))]
    gm = transform(model, x, options.recipe).train()
    wrapped, optimizer = shared(gm, processes, blocks), make_optimizer(gm, options)
    measured = measure_peak_bytes(Added(wrapped), (x,), optimizer, cost)
    predicted = predict(options, 3, processes)
    if processes.first:
        print(json.dumps([measured, predicted.peak_bytes]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["full", "s2a"])
@pytest.mark.parametrize(("parallel", "accumulation"), [("ddp", 1), ("fsdp", 1), ("fsdp", 2)])
def test_of_one_of_two_processes(parallel, accumulation, recipe, tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "two.py")]
    command += [str(Path(__file__).parent), parallel, recipe, str(accumulation)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # under FSDP a tenth of what is measured hangs on when gathered weights are let go of
    measured, predicted = json.loads(done.stdout.splitlines()[-1])
    assert 0.99 * measured < predicted < (1.5 if parallel == "fsdp" else 1.02) * measured


@pytest.mark.slow
def test_shares_of_weights_are_smaller_among_more_processes(tmp_path):
    options = small_run(tmp_path, tmp_path, recipe="full", model_options={**SMALL, "depth": 8})
    two, eight = (predict(options, 3, Processes(count=count, parallel="fsdp")).bytes for count in (2, 8))
    assert eight < two < predict(options, 3, Processes()).bytes < predict(options, 3, Processes(count=2, parallel="ddp")).bytes


FILES = {
    1: ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("", "memory.max", "memory.current", "inactive_file"),
}


@pytest.mark.parametrize("version", [1, 2])
def test_what_a_cgroup_leaves_is_its_limit_less_what_stands(version, tmp_path):
    root, limit, used, dropped = FILES[version]
    (tmp_path / "cgroup").write_text("4:cpu:/other\n" + ("3:memory:/job/step\n" if version == 1 else "0::/job/step\n"))
    for folder, most in (("", "max" if version == 2 else str(2**63)), ("job", "1000"), ("job/step", "5000")):
        place = tmp_path / root / folder
        place.mkdir(parents=True, exist_ok=True)
        (place / limit).write_text(f"{most}\n")
        (place / used).write_text("700\n")
        (place / "memory.stat").write_text(f"anon 600\n{dropped} 100\n")
    assert min(left_in_cgroups(tmp_path / "cgroup", tmp_path)) == 400
    assert left_in_cgroups(tmp_path / "none", tmp_path) == []


def test_processes_of_one_machine_share_what_is_free(monkeypatch):
    alone = free_bytes(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_bytes(torch.device("cpu")) == pytest.approx(alone / 4, rel=0.2)
