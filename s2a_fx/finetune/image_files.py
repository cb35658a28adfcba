"""Check the files of an image folder before a run: a broken link would end it late, and a pipe would make it wait for ever."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from timm.data.readers.reader_image_folder import ReaderImageFolder
from torchvision.datasets import DatasetFolder

from s2a_fx.errors import InputError
from s2a_fx.file_kind import kind_of


def image_files(dataset: Any) -> list[str]:
    """The paths of a data set's images if it is a folder of them, timm's or torchvision's; none for other data sets."""
    reader = getattr(dataset, "reader", None)
    if isinstance(reader, ReaderImageFolder):
        return reader.filenames(absolute=True)  # type: ignore[no-any-return]
    return [file for file, _ in dataset.samples] if isinstance(dataset, DatasetFolder) else []


def check_plain(files: Iterable[str]) -> None:
    """Refuse the first of the files that is no plain file, or a link to none.

    Raises:
        InputError: there is such a file.
    """
    files = list(files)
    strange = {path for folder in dict.fromkeys(map(os.path.dirname, files)) for path in _not_plain(folder)}
    first = next((file for file in files if file in strange), None)
    if first is not None:
        raise InputError(f"{first}: {_fault(Path(first))}; mend it or take it out.")


def _not_plain(folder: str) -> Iterator[str]:
    """What lies in the folder and is no plain file. Listed, a plain file need not be opened or asked for: there may be millions."""
    with os.scandir(folder) as entries:
        yield from (entry.path for entry in entries if not _is_plain(entry))


def _is_plain(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # links in a circle, or into a folder that cannot be entered
        return False


def _fault(file: Path) -> str:
    try:
        return f"is {kind_of(file.stat().st_mode)}, wanted a plain file"
    except OSError as error:
        leads = f"is a link to {file.readlink()} and " if file.is_symlink() else ""
        return f"{leads}cannot be read ({error.strerror})"
