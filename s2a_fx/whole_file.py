"""Files that are written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def written_whole(path: Path, part: Path) -> Iterator[BinaryIO]:
    """Write into `part`, a file beside `path`, which takes the place of `path` when all of it is on the disk.

    On any error `part` is removed, and an older file at `path` stays as it is.
    """
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
