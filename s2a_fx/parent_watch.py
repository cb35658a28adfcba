"""End a child process when its parent ends, however that ends."""

import multiprocessing
import os
import threading
from multiprocessing.process import BaseProcess

_INTERVAL = 1.0  # seconds; the sentinel tells at once, but a process that was forked later may hold its other end open


def end_with_parent() -> None:
    """Watch the parent of this process of multiprocessing from a thread; when it is gone, end at once, whatever runs.

    For every start method: the sentinel is that of the process that asked for this one, also where a fork server forked it.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_watch, args=(parent, os.getppid()), name="parent watch", daemon=True).start()


def _watch(parent: BaseProcess, forked_by: int) -> None:
    while parent.is_alive() and os.getppid() == forked_by:
        parent.join(_INTERVAL)
    os._exit(1)
