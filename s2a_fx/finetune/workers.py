"""How many processes may load images."""

import multiprocessing
import os
import warnings

import torch

from s2a_fx.errors import InputError, S2AWarning
from s2a_fx.finetune.free_memory import free_bytes
from s2a_fx.usable_cores import usable_cores

_OF_A_CORE = 16  # decoding keeps a core busy; waiting for a slow disk or network lets several share one, and more of them only wait
_BYTES = {"fork": 64 * 2**20}  # 15 to 30 MB of its own, and its batches
_BYTES_OF_OTHERS = 512 * 2**20  # one that is not a fork imports torch anew: 405 MB


def check_workers(workers: int, first: bool = True) -> None:
    """Check `workers`, of each process on this machine, before any is started.

    Warns if they are more than the cores that can be used; `first`: this process is the one that warns.

    Raises:
        InputError: they are more than the machine can hold.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cores, of_each = usable_cores(), f" in each of {processes} processes" if processes > 1 else ""
    most = most_workers(cores, processes)
    if workers > most:
        raise InputError(
            f"workers: got {workers}{of_each}, wanted {most} at most, by this machine's cores ({cores} usable) and free memory; "
            f"give --workers {min(most, max(cores // processes, 1))}."
        )
    if first and workers * processes > cores:
        warnings.warn(
            f"workers: {workers}{of_each} load images on {cores} usable {'core' if cores == 1 else 'cores'}; more than --workers "
            f"{cores // processes} helps only where the disk is slow.",
            S2AWarning,
            stacklevel=2,
        )


def most_workers(cores: int, processes: int = 1) -> int:
    """The most that each of the machine's `processes` may start: what its share of cores and free memory can hold.

    Up to one a core is always allowed.
    """
    method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    held = free_bytes(torch.device("cpu")) // _BYTES.get(method, _BYTES_OF_OTHERS)  # of this process's share
    return max(min(_OF_A_CORE * cores // processes, held), cores // processes, 1)
