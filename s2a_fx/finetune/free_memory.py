"""What memory is free for a process."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from s2a_fx.cgroups import CGROUPS, MOUNTED, folders_of

_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}
"""By version of the cgroups: limit, use, and what of the use can be dropped."""


def free_bytes(device: torch.device) -> int:
    """What is free on the device now, in bytes; on the CPU, this process's share of what can be had without swapping.

    On the CPU the processes that torchrun started on the machine share what the system and the process's cgroups leave them.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = min([_free_of_machine(), *left_in_cgroups(CGROUPS, MOUNTED)])
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _free_of_machine() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def left_in_cgroups(cgroups: Path, mounted: Path) -> list[int]:
    """Bytes that are left in each cgroup that limits this process, of version 1 or 2; files in the cache can be dropped."""
    return [left for version, folder in folders_of("memory", cgroups, mounted) for left in _left(folder, *_FILES[version])]


def _left(folder: Path, limit: str, used: str, dropped: str) -> Iterator[int]:
    try:
        most, now = int((folder / limit).read_text()), int((folder / used).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # not seen from here, or without a limit: "max"
        return
    yield max(most - now + int(statistics.get(dropped, 0)), 0)
