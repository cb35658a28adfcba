"""A folder that one run at a time writes into."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from s2a_fx.errors import InputError

LOCK = ".lock"


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold the folder, which is made if need be. The system lets go of it when this process ends, however it ends.

    Raises:
        InputError: another process holds it, or it cannot be written.
    """
    import fcntl  # Windows has none

    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("ab")  # "wb" would empty what a link of this name leads to
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror}; give another --output.") from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # and not flock, which processes that load images would inherit
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):  # others: a file system that knows no locks
                raise InputError(f"{folder}: another process trains there now; wait for it, or give another --output.") from error
        yield
