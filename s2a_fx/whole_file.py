"""Write a plain file whole or not at all; write into pipes and devices, and never replace them.

What a path names decides how it is written:

1. A plain file, or no file yet: a part beside it is written and then takes its place.
2. A symbolic link: the link is followed and stays. A link to a missing file makes that file.
3. A pipe, a character device such as `/dev/null`, or an open file of this process such as `/dev/stdout`: bytes are written into it.
4. Anything else (a folder, a socket, a disk) is refused.
"""

import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from s2a_fx.file_kind import kind_of

_MOST_LINKS = 40  # as Linux has it


@dataclass(frozen=True)
class Destination:
    """What a path names.

    Attributes:
        path: the plain file to replace, links followed; or the pipe or device to open.
        kind: as `kind_of` has it; a file that does not exist yet is a plain one.
        descriptor: the open file of this process that the path names; None for other paths.
        identity: two paths to the same file have the same, also through links of either kind.
    """

    path: Path
    kind: str
    descriptor: int | None
    identity: tuple[int | str, ...]

    @property
    def is_replaced(self) -> bool:
        """Whether a new file takes its place; otherwise bytes are written into it."""
        return self.descriptor is None and self.kind == "a plain file"

    def is_same_file(self, other: "Destination") -> bool:
        """Whether one would overwrite the other, or mix with it. Devices are no files: `/dev/null` takes any number."""
        return self.identity == other.identity and self.kind != "a character device"


def destination(path: Path) -> Destination:
    """Find what `path` names; nothing is written.

    Raises:
        OSError: it cannot be written; its `strerror` says why.
    """
    descriptor = _own_descriptor(path)
    if descriptor is not None:
        return _of_open_file(path, descriptor)
    try:
        found = path.stat()
    except FileNotFoundError:
        return _of_missing_file(Path(os.path.realpath(path)))
    kind = kind_of(found.st_mode)
    if kind == "a plain file":
        target = Path(os.path.realpath(path))
        _require_folder(target.parent)
        if not target.exists():  # a deleted file that another process has open, by its path in /proc
            raise OSError(errno.ENOENT, "it has no name any more")
        return Destination(target, kind, None, (found.st_dev, found.st_ino))
    _require_writable(kind)
    if not os.access(path, os.W_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    return Destination(path, kind, None, (found.st_dev, found.st_ino))


def _of_open_file(path: Path, descriptor: int) -> Destination:
    import fcntl  # Windows has none, and no such paths

    found = os.fstat(descriptor)
    kind = kind_of(found.st_mode)
    if kind != "a socket":  # opened, it is a stream like others
        _require_writable(kind)
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "it is open for reading only")
    return Destination(path, kind, descriptor, (found.st_dev, found.st_ino))


def _of_missing_file(target: Path) -> Destination:
    _require_folder(target.parent)
    folder = target.parent.stat()
    return Destination(target, "a plain file", None, (folder.st_dev, folder.st_ino, target.name))


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise OSError(errno.ENOENT, f"there is no folder {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OSError(errno.EACCES, f"no file can be made in the folder {folder}")


def _require_writable(kind: str) -> None:
    if kind not in ("a plain file", "a pipe", "a character device"):
        raise OSError(errno.EINVAL, f"it is {kind}")


def _own_descriptor(path: Path) -> int | None:
    """The number of the open file of this process that `/dev/stdout`, `/dev/fd/3`, or a link to such a path names."""
    folders = {os.path.realpath("/dev/fd"), f"/proc/{os.getpid()}/fd"}
    for _ in range(_MOST_LINKS):
        folder = os.path.realpath(path.parent)
        if folder in folders and path.name.isdecimal():
            return int(path.name)
        if not path.is_symlink():
            return None
        path = Path(folder, path.readlink())
    return None


def own_part(target: Path) -> Path:
    """A file beside `target` that no one else writes into: replicas may write side by side, on machines that share a disk."""
    return target.with_name(f".s2a_fx.{secrets.token_hex(8)}.part")


@contextmanager
def written_whole(path: Path, part_of: Callable[[Path], Path] = own_part) -> Iterator[BinaryIO]:
    """Write to what `path` names (see the module's docstring).

    On any error an older plain file stays as it is and its part is removed; otherwise the new file has the older one's mode.

    Args:
        part_of: the part's path, from that of the file to replace.

    Raises:
        OSError: `path` cannot be written.
    """
    found = destination(path)
    with _replacement(found.path, part_of(found.path)) if found.is_replaced else _stream(found) as file:
        yield file


@contextmanager
def _replacement(target: Path, part: Path) -> Iterator[BinaryIO]:
    try:
        part.unlink(missing_ok=True)  # what a killed process left, or a link that must not be followed
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            part.chmod(stat.S_IMODE(target.stat().st_mode))
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _stream(found: Destination) -> Iterator[BinaryIO]:
    if found.descriptor is None:  # without O_CREAT: a pipe that is gone by now is an error
        descriptor = os.open(found.path, os.O_WRONLY | getattr(os, "O_NOCTTY", 0))
    else:
        descriptor = os.dup(found.descriptor)  # shares the place where the next byte goes
    with os.fdopen(descriptor, "wb") as file:
        yield file
