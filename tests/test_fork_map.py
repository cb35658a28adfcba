"""fork_map: order, errors of either process, and no child left waiting."""

import multiprocessing
import subprocess
import sys

import pytest

from s2a_fx.errors import S2AError
from s2a_fx.fork_map import fork_map

LARGE = 1 << 20  # more than a pipe holds: its sender waits for a reader


def test_results_come_in_the_order_of_the_items():
    assert fork_map(lambda n: n * n, range(5), jobs=2) == [0, 1, 4, 9, 16]


@pytest.mark.parametrize("bad", [0, 1])  # dealt to the child, to this process
def test_an_error_of_either_process_is_raised_and_no_child_remains(bad):
    def function(n: int) -> bytes:
        if n == bad:
            raise S2AError(f"item {n}")
        return bytes(LARGE)

    with pytest.raises(S2AError, match=f"item {bad}"):
        fork_map(function, range(2), jobs=2)
    assert not multiprocessing.active_children()


STUCK = """
import time
from s2a_fx.fork_map import fork_map

def stuck(item):
    if item == 0:
        print("child", flush=True)
    time.sleep(60)

fork_map(stuck, range(2), jobs=2)
"""


@pytest.mark.slow
def test_a_child_ends_with_a_parent_that_is_killed():
    with subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout.readline() == "child\n"
        started.kill()
        started.communicate(timeout=20)  # the pipe ends with the last process that holds it
