"""Where the control groups of this process stand, of version 1 or 2: what limits its memory and its cores on Linux."""

from collections.abc import Iterator
from pathlib import Path

CGROUPS, MOUNTED = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def folders_of(controller: str, cgroups: Path = CGROUPS, mounted: Path = MOUNTED) -> Iterator[tuple[int, Path]]:
    """The version and folder of each group that this process is in, inner ones first, for `memory` or `cpu`."""
    lines = cgroups.read_text().splitlines() if cgroups.exists() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if not controllers:
            version, root = 2, mounted
        elif controller in controllers.split(","):
            version, root = 1, mounted / controller
        else:
            continue
        inner = root / path.lstrip("/")
        yield from ((version, folder) for folder in (inner, *inner.parents) if folder.is_relative_to(root))
