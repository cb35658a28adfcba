"""Files that are written whole or not at all."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def own_part(path: Path) -> Path:
    """A file beside `path` that no one else writes into: replicas may write side by side, on machines that share a disk."""
    return path.with_name(f".s2a_fx.{secrets.token_hex(8)}.part")


@contextmanager
def written_whole(path: Path, part: Path) -> Iterator[BinaryIO]:
    """Write into `part`, a file beside `path`, which takes the place of `path` when all of it is on the disk.

    On any error `part` is removed, and an older file at `path` stays as it is; otherwise the new one has its mode.
    """
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            part.chmod(path.stat().st_mode)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
