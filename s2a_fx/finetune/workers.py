"""Processes that load images: how many, and what each does when it starts."""

import os
import threading
import time
import warnings

from s2a_fx.errors import InputError

PER_CORE = 4
"""Processes for each core beyond which they only take memory: a core decodes for one at a time, the others wait for their disk."""
LEAST_LIMIT = 16


def check_workers(count: int) -> None:
    """Warn of more processes than this machine has cores; raise `InputError` for more than it can use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = max(LEAST_LIMIT, PER_CORE * cores)
    if count > limit:
        raise InputError(
            f"workers: got {count}, wanted {limit} at most: each is a process, and this machine has {cores} cores; give {cores}."
        )
    if count > cores:
        warnings.warn(f"workers: {count} processes load images on {cores} cores; {cores} would do.", stacklevel=4)


def start_worker(worker: int) -> None:
    """Put a process that loads images into a group of its own, and let it end with its parent.

    What asks the run to stop is sent to the run's whole group.
    """
    os.setpgrp()
    parent = os.getppid()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
