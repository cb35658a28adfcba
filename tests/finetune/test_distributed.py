"""Two processes train as one that has their batches together."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from colours import SMALL, small_run, stored

import s2a_fx
from s2a_fx.finetune import finetune
from s2a_fx.finetune.data import Order
from s2a_fx.zoo import create_model

LINE = """
import sys
from pathlib import Path
sys.path.append(sys.argv[1])
from colours import SMALL, small_run
from s2a_fx.finetune import finetune
changes = {"optimizer": "sgd", "lr": 0.01, "epochs": 2, "model_options": SMALL, "batch_size": 4, "recipe": sys.argv[5]}
changes["resume"] = "resume" in sys.argv
finetune(small_run(Path(sys.argv[2]), Path(sys.argv[3]), parallel=sys.argv[4], **changes), say=print)
"""


def _two(tmp_path: Path, *arguments: str) -> str:
    (tmp_path / "two.py").write_text(LINE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "two.py")]
    done = subprocess.run([*command, str(Path(__file__).parent), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


whole_order = Order.__iter__


def _in_turn(order: list[int]) -> Iterator[int]:
    """The images of both processes' batches, those of the first before those of the second."""
    for start in range(0, len(order), 8):
        yield from order[start : start + 8][0::2]
        yield from order[start : start + 8][1::2]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["full", "bias+checkpoint", "s2a", "s2a-max"])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_twelve_steps_of_two_processes_are_those_of_one(parallel, recipe, colours, tmp_path, monkeypatch):
    printed = _two(tmp_path, str(colours), str(tmp_path / "two"), parallel, recipe)
    assert printed.count("epoch 1/2") == 1  # the first process alone prints
    monkeypatch.setattr(Order, "__iter__", lambda order: _in_turn(list(whole_order(order))))
    changes = {"optimizer": "sgd", "lr": 0.01, "epochs": 2, "model_options": SMALL, "recipe": recipe}
    changes |= {"batch_size": 4, "grad_accumulation": 2}  # codes round about the mean of the batch that they are made in
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
def test_the_task_file_of_a_sharded_run_loads_in_one_process(colours, tmp_path):
    _two(tmp_path, str(colours), str(tmp_path / "two"), "fsdp", "s2a")
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
