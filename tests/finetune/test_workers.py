"""Processes that load images: no more than the machine holds, and none that outlives its run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from colours import small_run

import s2a_fx.finetune.run as run
import s2a_fx.finetune.workers as bounds
from s2a_fx.cli import main
from s2a_fx.errors import InputError, S2AWarning
from s2a_fx.finetune import finetune
from s2a_fx.finetune.workers import check_workers, most_workers


@pytest.fixture
def machine(monkeypatch):
    """Two cores, 64 GB free, and processes that fork; a run may not come beyond the check."""
    monkeypatch.setattr(bounds, "usable_cores", lambda: 2)
    monkeypatch.setattr(bounds, "free_bytes", lambda device: 64 * 10**9)
    monkeypatch.setattr(bounds.multiprocessing, "get_start_method", lambda allow_none: "fork")

    def begun(*arguments):
        raise AssertionError("the run was begun")

    monkeypatch.setattr(run, "open_data", begun)
    return monkeypatch


@pytest.mark.parametrize("workers", [33, 1_000_000, 10**30])
def test_more_than_the_machine_holds_are_refused_before_the_run(workers, machine, tmp_path):
    with pytest.raises(InputError, match=rf"workers: got {workers}, wanted 32 at most.*2 usable.*; give --workers 2\.$"):
        finetune(small_run(tmp_path, tmp_path / "run", workers=workers))


def test_the_command_line_refuses_them_in_one_line(machine, tmp_path, capsys):
    command = ["finetune", "vit_tiny_patch16_224", str(tmp_path), "--from-scratch", "--device", "cpu", "--workers", "1000000"]
    assert main(command) == 2
    told = capsys.readouterr().err
    assert told.startswith("s2a-fx: error: workers: got 1000000, wanted 32 at most") and told.count("\n") == 1


@pytest.mark.parametrize(("workers", "warned"), [(0, False), (2, False), (3, True), (32, True)])
def test_more_than_the_cores_are_warned_of(workers, warned, machine, recwarn):
    check_workers(workers)
    told = [str(w.message) for w in recwarn if w.category is S2AWarning]
    assert [line.partition(";")[0] for line in told] == [f"workers: {workers} load images on 2 usable cores"] * warned


def test_processes_of_one_machine_share_its_cores(machine, recwarn):
    machine.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"got 17 in each of 2 processes, wanted 16 at most.*; give --workers 1"):
        check_workers(17)
    check_workers(2, first=False)
    assert not [w for w in recwarn if w.category is S2AWarning]
    check_workers(2)
    assert "2 in each of 2 processes load images on 2 usable cores" in str(recwarn.pop(S2AWarning).message)


@pytest.mark.parametrize(("method", "most"), [("fork", 14), ("spawn", 2), ("forkserver", 2)])
def test_little_memory_holds_fewer_but_always_one_a_core(method, most, machine):
    machine.setattr(bounds, "free_bytes", lambda device: 10**9)
    machine.setattr(bounds.multiprocessing, "get_start_method", lambda allow_none: method)
    assert most_workers(2) == most


STUCK = """
import multiprocessing, os, sys, time
from pathlib import Path
sys.path.append(sys.argv[1])
from colours import small_run
import s2a_fx.finetune.draws as draws
from s2a_fx.finetune import finetune

def stuck(*place):
    Path(sys.argv[3], f"{os.getpid()}.worker").touch()
    time.sleep(600)

draws.draw_for_image = stuck
if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[4])
    finetune(small_run(Path(sys.argv[2]), Path(sys.argv[3], "run"), workers=2))
"""


def _runs(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _wait(condition, seconds):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks Linux which processes run")
@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_workers_end_with_a_run_that_is_killed(start, colours, tmp_path):
    """In the middle of an image, where a worker of torch's looks at nothing."""
    (tmp_path / "stuck.py").write_text(STUCK)
    command = [sys.executable, str(tmp_path / "stuck.py"), str(Path(__file__).parent), str(colours), str(tmp_path), start]
    started = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def workers():
        return [int(file.stem) for file in tmp_path.glob("*.worker")]

    try:
        assert _wait(lambda: len(workers()) == 2 or started.poll() is not None, 120)
        assert started.poll() is None and all(map(_runs, workers()))
        started.kill()
        started.wait()
        assert _wait(lambda: not any(map(_runs, workers())), 10)
    finally:
        for process in (started.pid, *workers()):
            if _runs(process):
                os.kill(process, signal.SIGKILL)
