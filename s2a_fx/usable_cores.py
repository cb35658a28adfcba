"""How many cores this process may use."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

from s2a_fx.cgroups import CGROUPS, MOUNTED, folders_of


def usable_cores() -> int:
    """The cores that the system lets this process run on, or the share of them that its cgroups leave it; 1 at least."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS has none
    return max(1, min([allowed, *map(math.ceil, quotas())]))


def quotas(cgroups: Path = CGROUPS, mounted: Path = MOUNTED) -> Iterator[float]:
    """The cores' time that each cgroup with a limit grants, in cores."""
    for version, folder in folders_of("cpu", cgroups, mounted):
        try:
            if version == 2:
                quota, period = map(int, (folder / "cpu.max").read_text().split())
            else:
                quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        except (OSError, ValueError):  # not seen from here, or without a limit: "max"
            continue
        if quota > 0 and period > 0:  # version 1 has -1 for no limit
            yield quota / period
