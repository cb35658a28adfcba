"""Two processes train as one that has their batches together."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from colours import SMALL, assert_same, small_run, stored
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import s2a_fx
from s2a_fx.finetune import finetune
from s2a_fx.finetune.distributed import without_sync
from s2a_fx.zoo import create_model

LINE = """
import json, os, sys
from pathlib import Path
sys.path.append(sys.argv[1])
import torch
import torch.distributed as dist
from colours import SMALL, small_run
import s2a_fx.finetune.training as training
from s2a_fx.finetune import finetune

data, output, parallel, changes = Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], json.loads(sys.argv[5])
rank, failing, whole_evaluate = int(os.environ["RANK"]), changes.pop("failing", None), training.evaluate
changes = {"optimizer": "sgd", "lr": 0.01, "model_options": SMALL, "batch_size": 4, **changes}

def evaluate(gm, *arguments, **settings):
    torch.save(dict(gm.named_buffers()), f"{output}.buffers{rank}")
    return whole_evaluate(gm, *arguments, **settings)

def fail(*arguments):
    if rank == 1 and arguments[1:3] == tuple(failing):
        raise MemoryError
    return drawn(*arguments)

training.evaluate = evaluate
if failing:
    import s2a_fx.finetune.data as loading
    drawn, loading.draw_for_batch = loading.draw_for_batch, fail
own = output if rank == 0 else output / "elsewhere"  # as on machines without a common disk
finetune(small_run(data, own, parallel=parallel, **changes), say=print)
"""


def _two(tmp_path: Path, data: Path, output: Path, parallel: str, fails: bool = False, **changes: Any) -> str:
    (tmp_path / "two.py").write_text(LINE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "two.py")]
    command += [str(Path(__file__).parent), str(data), str(output), parallel, json.dumps(changes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode != 0) == fails, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "batches"), [("full", 1), ("bias+lrp+lsb", 1), ("bias+checkpoint", 2), ("s2a", 1), ("s2a", 2), ("s2a-max", 1)]
)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_twelve_steps_of_two_processes_are_those_of_one(parallel, recipe, batches, colours, tmp_path):
    """Two processes, with so many `batches` added up in each, and one that has all their images in one batch."""
    printed = _two(tmp_path, colours, tmp_path / "two", parallel, recipe=recipe, batch_size=4 // batches, grad_accumulation=batches)
    assert printed.count("epoch 1/2") == 1  # the first process alone prints
    changes = {"optimizer": "sgd", "lr": 0.01, "model_options": SMALL, "recipe": recipe}
    result = finetune(small_run(colours, tmp_path / "one", **changes))
    one, two = stored(tmp_path / "one"), stored(tmp_path / "two")
    assert one["trained"].keys() == two["trained"].keys()
    for name, weight in one["trained"].items():
        assert torch.allclose(weight, two["trained"][name], rtol=0, atol=1e-5), name
    for mine, theirs in zip(result.epochs, two["position"]["epochs"], strict=True):
        assert mine.loss == pytest.approx(theirs["loss"], abs=1e-5)
        assert mine.accuracy.top1 == theirs["accuracy"]["top1"]
    assert two["optimizer"]["state"].keys() == one["optimizer"]["state"].keys()


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_with_batch_norms_a_failure_and_added_batches_two_processes_resume_to_the_same_bits(parallel, colours, tmp_path):
    changes = {"model": "resnet10t", "model_options": {}, "recipe": "bias", "optimizer": "adamw"}
    changes |= {"batch_size": 2, "grad_accumulation": 2, "channels_last": True}
    _two(tmp_path, colours, tmp_path / "whole", parallel, **changes)
    here, there = (torch.load(tmp_path / f"whole.buffers{rank}") for rank in (0, 1))
    assert_same(here, there)  # both evaluate what is kept
    assert_same({n: here[n] for n in stored(tmp_path / "whole")["buffers"]}, stored(tmp_path / "whole")["buffers"])
    _two(tmp_path, colours, tmp_path / "two", parallel, fails=True, save_every=2, failing=(1, 7), **changes)
    assert stored(tmp_path / "two")["position"]["updates"] == 2
    assert len(stored(tmp_path / "two")["position"]["epochs"]) == 1
    _two(tmp_path, colours, tmp_path / "two", parallel, resume=True, **changes)
    for name in ("last.pt", "best.pt"):
        assert_same(stored(tmp_path / "two", name), stored(tmp_path / "whole", name))


@pytest.mark.slow
def test_the_task_file_of_a_sharded_run_loads_in_one_process(colours, tmp_path):
    _two(tmp_path, colours, tmp_path / "two", "fsdp", recipe="s2a")
    torch.manual_seed(0)
    model = create_model("vit_tiny_patch16_224", num_classes=3, image_size=32, **SMALL)
    gm = s2a_fx.transform(model, torch.randn(4, 3, 32, 32))
    s2a_fx.load_adapter(gm, tmp_path / "two" / "task.safetensors")
    best = stored(tmp_path / "two", "best.pt")["trained"]
    assert all(torch.equal(p, best[n]) for n, p in gm.named_parameters() if p.requires_grad)


def test_sharing_asked_of_one_process_is_refused(colours, tmp_path):
    with pytest.raises(ValueError, match="start several: torchrun"):
        finetune(small_run(colours, tmp_path / "run", parallel="fsdp"))
    assert not (tmp_path / "run").exists()


def test_gradients_of_a_compiled_model_are_shared_once_an_update():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(nn.Linear(2, 2))
        with without_sync(torch.compile(wrapped), True):
            assert not wrapped.require_backward_grad_sync
        assert wrapped.require_backward_grad_sync
    finally:
        dist.destroy_process_group()
