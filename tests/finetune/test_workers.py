"""How many processes load images, and when they end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from colours import small_run

import s2a_fx
from s2a_fx.finetune import workers

CORES = 2


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda _: set(range(CORES)), raising=False)


@pytest.mark.parametrize("count", [workers.LEAST_LIMIT + 1, 1_000_000])
def test_more_workers_than_the_machine_can_use_are_refused(count, tmp_path):
    with pytest.raises(s2a_fx.InputError, match=rf"workers: got {count}, wanted 16 at most.*2 cores"):
        small_run(tmp_path, tmp_path, workers=count)


def test_more_workers_than_cores_are_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="3 processes load images on 2 cores"):
        small_run(tmp_path, tmp_path, workers=CORES + 1)


LOADS = """
import sys, torch
from s2a_fx.finetune.workers import start_worker

class Slow(torch.utils.data.Dataset):
    def __len__(self): return 100
    def __getitem__(self, index):
        import os, time
        print(os.getpid(), flush=True)
        time.sleep(1000)

for _ in torch.utils.data.DataLoader(Slow(), num_workers=2, worker_init_fn=start_worker): pass
"""


def test_workers_end_when_their_parent_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", LOADS], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    children = [int(parent.stdout.readline()) for _ in range(2)]
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 20
    while any(_runs(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(_runs(pid) for pid in children)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
