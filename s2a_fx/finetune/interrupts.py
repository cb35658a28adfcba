"""Ctrl-C that loses nothing."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


class Stopped(KeyboardInterrupt):
    """A run was interrupted; its last checkpoint holds all that was done."""


@dataclass
class Interrupts:
    """Whether Ctrl-C was pressed."""

    any: bool = False


@contextmanager
def interrupts() -> Iterator[Interrupts]:
    """Inside, Ctrl-C is only noted: the loop ends the step and saves. In threads other than the main one it is not seen."""
    noted = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return

    def note(signum: int, frame: Any) -> None:
        noted.any = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)
