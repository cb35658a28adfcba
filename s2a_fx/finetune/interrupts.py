"""Ctrl-C and SIGTERM that lose nothing."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from s2a_fx.parent_watch import end_with_parent

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A run was interrupted; its last checkpoint holds all that was done."""


@dataclass
class Interrupts:
    """Whether the run was asked to stop."""

    any: bool = False

    def note(self, signum: int, frame: Any) -> None:
        """The first signal is noted; a Ctrl-C after it stops at once: what it waits for may never come."""
        if self.any and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.any = True


@contextmanager
def interrupts() -> Iterator[Interrupts]:
    """Inside, Ctrl-C and SIGTERM are only noted: the loop ends the step and saves. Threads other than the main one see none."""
    noted = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = {number: signal.signal(number, noted.note) for number in SIGNALS}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stand_apart(worker: int) -> None:
    """Put a process that loads images into a group of its own: what asks the run to stop is sent to the run's whole group.

    What kills the run does not reach it then, so it watches the run.
    """
    os.setpgrp()
    end_with_parent()
