"""Files that are written whole or not at all, and devices and pipes, which are written to."""

import os
import secrets
import stat
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


def check_destination(path: Path) -> None:
    """Raise `OSError` unless a file can be written at `path`: a plain file, new or old, a link to one, a device or a pipe."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:  # of a link that leads nowhere, its target is made
        parent = Path(os.path.realpath(path)).parent
        if not parent.is_dir():
            raise FileNotFoundError(f"there is no folder {parent}; create it or name another file") from None
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError("is a folder; name a file in it")
    if stat.S_ISSOCK(mode):
        raise OSError("is a socket; name a file, a device or a pipe")


def is_same_file(one: Path, other: Path) -> bool:
    """Whether two paths name one file, there or not, through whatever links."""
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    return one.exists() and other.exists() and one.samefile(other)


def write_file(path: Path, data: bytes) -> None:
    """Write `data` to a file, whole or not at all; a link is followed, and a device or pipe is written to.

    Raises:
        OSError: the file cannot be written; an older one stays as it is.
    """
    check_destination(path)
    if path.exists() and (not path.is_file() or path.is_relative_to("/dev") or path.is_relative_to("/proc")):
        with path.open("ab", buffering=0) as stream:  # /dev/stdout may be a file that others write to
            stream.write(data)
        return
    target = Path(os.path.realpath(path))
    with written_whole(target, own_part(target)) as file:
        file.write(data)
