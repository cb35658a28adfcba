"""A run that is stopped anywhere and resumed ends in the same weights, to the last bit."""

import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from colours import SMALL, assert_same, small_run, stored
from torch import nn

import s2a_fx.finetune.data as data
import s2a_fx.finetune.run as run
import s2a_fx.finetune.training as training
from s2a_fx.cli import main
from s2a_fx.finetune import Stopped, finetune
from s2a_fx.finetune.checkpoint import Position, State, read, write
from s2a_fx.finetune.draws import draw_for_batch
from s2a_fx.finetune.interrupts import interrupts
from s2a_fx.passes import FreezeWeights, InsertLoRA
from s2a_fx.recipes import RECIPES
from s2a_fx.transform import transform


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


@pytest.mark.slow
def test_after_ctrl_c_in_an_evaluation(colours, whole_run, tmp_path, monkeypatch):
    evaluate = training.evaluate

    def interrupted(*arguments, **settings):
        signal.raise_signal(signal.SIGTERM)
        return evaluate(*arguments, **settings)

    monkeypatch.setattr(training, "evaluate", interrupted)
    options = small_run(colours, tmp_path / "run")
    for epoch in (1, 2):
        with pytest.raises(Stopped, match=f"after epoch {epoch}; .*--resume"):
            finetune(replace(options, resume=epoch == 2))
    assert not (options.folder / "task.safetensors").exists()
    monkeypatch.undo()
    finetune(replace(options, resume=True))
    assert_same(stored(tmp_path / "run"), stored(whole_run[0].folder))
    assert (options.folder / "task.safetensors").exists()


def test_a_second_ctrl_c_stops_at_once():
    with interrupts() as asked:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert asked.any
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


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


SLOWLY = """
import multiprocessing, sys, time
from pathlib import Path
sys.path.append(sys.argv[1])
from colours import small_run
import s2a_fx.finetune.draws as draws
from s2a_fx.finetune import finetune

def slowly(*place):
    time.sleep(0.03)
    drawn(*place)

drawn, draws.draw_for_image = draws.draw_for_image, slowly  # the run waits for images nearly always
if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[4])
    finetune(small_run(Path(sys.argv[2]), Path(sys.argv[3]), save_every=1, workers=1))
"""


def _started_slowly(tmp_path, colours, start, epochs, updates):
    """A run in a session of its own that has done so much."""
    (tmp_path / "slowly.py").write_text(SLOWLY)
    command = [sys.executable, str(tmp_path / "slowly.py"), str(Path(__file__).parent), str(colours), str(tmp_path / "run"), start]
    started = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    while _done(tmp_path / "run") < (epochs, updates):
        assert started.poll() is None
        time.sleep(0.01)
    return started


def _done(folder):
    position = stored(folder)["position"] if (folder / "last.pt").exists() else {"epochs": [], "updates": 0}
    return len(position["epochs"]), position["updates"]


@pytest.mark.slow
@pytest.mark.parametrize("moment", [(0, 1), (0, 3), (1, 1), (1, 2)], ids="epoch {0[0]}, step {0[1]}".format)
def test_after_a_kill_at_any_moment(moment, colours, whole_run, tmp_path):
    killed = _started_slowly(tmp_path, colours, "fork", *moment)
    time.sleep(random.Random(repr(moment)).uniform(0, 0.1))
    killed.kill()
    killed.wait()
    epochs, updates = _done(tmp_path / "run")
    assert (epochs, updates) >= moment
    assert 0 < updates < 6
    finetune(small_run(colours, tmp_path / "run", resume=True))  # though processes that load images may not have ended yet
    assert_same(stored(tmp_path / "run"), stored(whole_run[0].folder))
    names = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert names == [".lock", "best.pt", "last.pt", "task.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "start"),  # a fork server, itself of the group, does not outlive SIGTERM
    [(signal.SIGINT, "spawn"), (signal.SIGINT, "forkserver"), (signal.SIGTERM, "fork"), (signal.SIGTERM, "spawn")],
)
def test_a_signal_to_all_processes_stops_the_run_alone(number, start, colours, tmp_path):
    started = _started_slowly(tmp_path, colours, start, 0, 2)
    os.killpg(started.pid, number)
    _, told = started.communicate(timeout=30)
    assert "Stopped: stopped in epoch 1 after step" in told
    assert "DataLoader worker" not in told


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


@pytest.mark.slow
def test_two_runs_never_write_into_one_folder(colours, whole_run, tmp_path, monkeypatch):
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(whole_run[0].folder / ".lock")]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(ValueError, match="another process trains there now"):
        finetune(small_run(colours, whole_run[0].folder, resume=True))
    other.communicate()
    open_data = run.open_data

    def while_another_trains(*given):
        shutil.copytree(whole_run[0].folder, tmp_path / "run")
        return open_data(*given)

    monkeypatch.setattr(run, "open_data", while_another_trains)
    with pytest.raises(ValueError, match="stands there already"):
        finetune(small_run(colours, tmp_path / "run"))
    assert_same(stored(tmp_path / "run"), stored(whole_run[0].folder))


def test_damaged_checkpoints_are_told(whole_run, tmp_path):
    last = tmp_path / "last.pt"
    data = (whole_run[0].folder / "last.pt").read_bytes()
    middle = data.index(stored(whole_run[0].folder)["trained"]["head.weight"].numpy().tobytes()) + 10
    flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    for broken in (b"half of a", data[:-100], flipped):
        last.write_bytes(broken)
        with pytest.raises(ValueError, match="no checkpoint of s2a-fx finetune, or a damaged one"):
            read(last)
    torch.save({"version": 0, "run": {}}, last)
    with pytest.raises(ValueError, match="version 0, this s2a_fx reads 1"):
        read(last)


def test_a_checkpoint_is_read_while_its_run_writes_another(whole_run, tmp_path, monkeypatch):
    last, newest = tmp_path / "last.pt", whole_run[0].folder / "last.pt"
    changed = read(newest)
    changed["trained"] = {name: value + 1 for name, value in changed["trained"].items()}
    write(changed, last)
    from_file = torch.UntypedStorage.from_file

    def after_another(*given):
        if last.read_bytes() != newest.read_bytes():
            shutil.copy(newest, tmp_path / "part")
            (tmp_path / "part").replace(last)
        return from_file(*given)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", after_another)
    assert_same(read(last), read(newest))


def test_a_lost_best_checkpoint_is_told_before_the_training(colours, tmp_path, monkeypatch):
    options = small_run(colours, tmp_path / "run", recipe="linear", save_every=1)
    _at_batch(monkeypatch, 8, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Stopped):
        finetune(options)
    (tmp_path / "run" / "best.pt").unlink()
    with pytest.raises(ValueError, match=r"best\.pt: there is no checkpoint"):
        finetune(replace(options, resume=True))
    assert _done(tmp_path / "run") == (1, 2)


def test_checkpoints_of_other_tensors_are_told_before_any_is_copied():
    gm = transform(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), torch.randn(2, 4), "full")
    state = State(gm, torch.optim.SGD(gm.parameters(), lr=0.1), torch.amp.GradScaler("cpu", enabled=False), {}, "")
    record = state.record(Position())
    state.check(record, Path("last.pt"))
    lacking = {name: t for name, t in record["trained"].items() if name != "0.bias"}
    for changes, told in (
        ({"trained": lacking}, "0.bias"),
        ({"trained": {**record["trained"], "0.bias": torch.ones(1)}}, "0.bias"),
        ({"trained": {**record["trained"], "0.bias": torch.ones(3).half()}}, "0.bias"),
        ({"trained": {**record["trained"], "2.bias": torch.ones(3)}}, "2.bias"),
        ({"buffers": {}}, "1.running_mean"),
        ({"optimizer": {"param_groups": []}}, "groups of parameters"),
    ):
        with pytest.raises(ValueError, match=told):
            state.check({**record, **changes}, Path("last.pt"))


def test_a_full_disk_is_told_and_the_last_checkpoint_stays(tmp_path):
    write({"step": 1}, tmp_path / "last.pt")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(ValueError, match=r"last\.pt: cannot be written"):
            write({"weight": torch.ones(10_000)}, tmp_path / "last.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read(tmp_path / "last.pt") == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("save_every", [0, 1])
def test_a_run_that_diverges_ends_and_leaves_finite_weights(save_every, colours, tmp_path):
    options = small_run(colours, tmp_path / "run", lr=1e30, recipe="full", optimizer="sgd", save_every=save_every)
    with pytest.raises(ValueError, match=r"lr: .* is not finite after 0 epochs and \d steps, at a rate of \d.*e\+29"):
        finetune(options)
    assert all(weight.isfinite().all() for weight in stored(tmp_path / "run")["trained"].values())
    assert not (tmp_path / "run" / "task.safetensors").exists()


def test_an_update_that_overflows_float16_is_skipped(colours, tmp_path, monkeypatch):
    calls = []

    def overflowing(options):
        loss = make_loss(options)
        return lambda output, targets: loss(output, targets) * (torch.inf if calls.append(output) or len(calls) == 3 else 1)

    make_loss = run.make_loss
    monkeypatch.setattr(run, "make_loss", overflowing)
    (epoch,) = finetune(small_run(colours, tmp_path / "run", amp="float16", epochs=1, recipe="linear")).epochs
    assert len(calls) == 6 and math.isfinite(epoch.loss)


def test_a_recipe_of_passes_is_resumed_and_goes_by_its_name(colours, tmp_path):
    passes = (FreezeWeights(keep=("head",)), InsertLoRA(rank=2))
    options = small_run(colours, tmp_path / "run", recipe=passes, epochs=1)
    finetune(options)
    finetune(replace(options, resume=True))
    with pytest.raises(ValueError, match=r"InsertLoRA\(rank=2.*got 'linear'"):
        finetune(replace(options, resume=True, recipe="linear"))
    assert replace(options, output=None).folder == Path("runs/vit_tiny_patch16_224-FreezeWeights+InsertLoRA")
    assert replace(options, recipe=RECIPES["s2a"]).of_the_result()["recipe"] == "s2a"


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


@pytest.fixture
def heeded():
    """Ctrl-C interrupts, though a shell began the tests in the background, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_command_line_takes_ctrl_c_before_the_first_step(heeded, colours, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "open_data", lambda *given: signal.raise_signal(signal.SIGINT))
    line = [
        "finetune",
        "vit_tiny_patch16_224",
        str(colours),
        "--from-scratch",
        "--output",
        str(tmp_path / "run"),
        "--device",
        "cpu",
    ]
    assert main(line) == 130
    assert capsys.readouterr().err == "s2a-fx: interrupted\n"
