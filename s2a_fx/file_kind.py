"""Say in words what a path names: a plain file, a folder, a pipe, a device."""

import stat

_KINDS = (
    (stat.S_ISREG, "a plain file"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


def kind_of(mode: int) -> str:
    """The kind of file that `st_mode` of a `stat` result says."""
    return next((kind for is_kind, kind in _KINDS if is_kind(mode)), "a special file")
