"""A run that is stopped anywhere and resumed ends in the same weights, to the last bit."""

import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from colours import SMALL, assert_same, small_run, stored

import s2a_fx.finetune.data as data
from s2a_fx.cli import main
from s2a_fx.finetune import Stopped, finetune
from s2a_fx.finetune.draws import draw_for_batch


def _at_batch(monkeypatch, number, act):
    """Do something when the run draws for its batch of this number."""
    drawn = []

    def counted(*place):
        draw_for_batch(*place)
        drawn.append(place)
        if len(drawn) == number:
            act()

    monkeypatch.setattr(data, "draw_for_batch", counted)


@pytest.mark.parametrize("batch", [4, pytest.param(12, marks=pytest.mark.slow)], ids=["in the first epoch", "at the last step"])
def test_after_ctrl_c(batch, colours, whole_run, tmp_path, monkeypatch):
    options = small_run(colours, tmp_path / "run")
    _at_batch(monkeypatch, batch, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Stopped, match=f"after step {(batch - 1) % 6 + 1}.*--resume"):
        finetune(options)
    assert stored(tmp_path / "run")["position"]["updates"] == (batch - 1) % 6 + 1
    monkeypatch.undo()
    finetune(replace(options, resume=True))
    assert_same(stored(tmp_path / "run"), stored(whole_run[0].folder))
    assert_same(stored(tmp_path / "run", "best.pt"), stored(whole_run[0].folder, "best.pt"))


def test_after_a_failure_between_checkpoints(colours, whole_run, tmp_path, monkeypatch):
    def fail():
        raise MemoryError

    options = small_run(colours, tmp_path / "run", save_every=3)
    _at_batch(monkeypatch, 11, fail)
    with pytest.raises(MemoryError):
        finetune(options)
    assert stored(tmp_path / "run")["position"]["updates"] == 3
    monkeypatch.undo()
    finetune(replace(options, resume=True))
    assert_same(stored(tmp_path / "run"), stored(whole_run[0].folder))


@pytest.mark.slow
def test_after_a_kill_at_any_moment(colours, whole_run, tmp_path):
    options = small_run(colours, tmp_path / "run", save_every=1)
    line = "import sys; sys.path.append(sys.argv[1]); from pathlib import Path; from colours import small_run; "
    line += "from s2a_fx.finetune import finetune; finetune(small_run(Path(sys.argv[2]), Path(sys.argv[3]), save_every=1))"
    run = subprocess.Popen([sys.executable, "-c", line, str(Path(__file__).parent), str(colours), str(tmp_path / "run")])
    while not (tmp_path / "run" / "last.pt").exists():
        assert run.poll() is None
        time.sleep(0.01)
    time.sleep(random.uniform(0, 1))
    run.kill()
    run.wait()
    finetune(replace(options, resume=True))
    assert_same(stored(tmp_path / "run"), stored(whole_run[0].folder))
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["best.pt", "last.pt", "task.safetensors"]


@pytest.mark.slow
def test_with_workers_and_without_are_the_same_run(colours, whole_run, tmp_path):
    finetune(small_run(colours, tmp_path / "run", workers=1))
    assert_same(stored(tmp_path / "run"), stored(whole_run[0].folder))


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"recipe": "bias"}, "recipe 's2a', got 'bias'"), ({"lr": 0.1}, "lr 0.003, got 0.1"), ({"seed": 5}, "seed 0, got 5")],
    ids=["recipe", "rate", "seed"],
)
def test_other_options_are_refused(changes, told, colours, whole_run):
    before = (whole_run[0].folder / "last.pt").read_bytes()
    with pytest.raises(ValueError, match=told):
        finetune(small_run(colours, whole_run[0].folder, resume=True, **changes))
    assert (whole_run[0].folder / "last.pt").read_bytes() == before


def test_a_run_is_never_overwritten_by_another(colours, whole_run):
    with pytest.raises(ValueError, match=r"stands there already.*--resume"):
        finetune(small_run(colours, whole_run[0].folder))


def test_a_folder_that_cannot_be_written_is_told_before_the_training(colours, tmp_path):
    (tmp_path / "file").touch()
    lines = []
    with pytest.raises(ValueError, match="cannot be written"):
        finetune(small_run(colours, tmp_path / "file" / "run"), lines.append)
    assert not any("epoch" in line for line in lines)


def test_a_damaged_checkpoint_is_told(colours, tmp_path):
    (tmp_path / "last.pt").write_bytes(b"half of a")
    with pytest.raises(ValueError, match="no checkpoint of s2a-fx finetune, or a damaged one"):
        finetune(small_run(colours, tmp_path, resume=True))


def test_the_command_line_exits_with_130_and_says_how_to_go_on(colours, tmp_path, monkeypatch, capsys):
    command = ["finetune", "vit_tiny_patch16_224", str(colours), "--output", str(tmp_path / "run"), "--device", "cpu"]
    command += ["--image-size", "32", "--epochs", "1", "--batch-size", "8", "--workers", "0", "--recipe", "linear"]
    command += ["--from-scratch"]
    command += [word for name, value in SMALL.items() for word in ("--model-option", f"{name}={value}")]
    _at_batch(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGINT))
    assert main(command) == 130
    assert "after step 2; go on with the same command and --resume" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    assert "0 epochs and 2 steps were done" in capsys.readouterr().out
