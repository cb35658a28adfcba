"""The file of a task: safetensors whose metadata has a digest of all that the file says. No pickle is read.

A file is checked as a whole before any of it is used: the header is strict JSON, its offsets tile the data, and the digest is that
of metadata and tensors. The digest tells a damaged file from a whole one; it is no signature.
"""

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError

from s2a_fx.errors import AdapterError
from s2a_fx.whole_file import written_whole

FORMAT = "s2a_fx.task"
VERSION = "1"
LARGEST_HEADER = 100_000_000  # bytes, safetensors' own bound

Contents = tuple[dict[str, str], dict[str, torch.Tensor]]


def bytes_of(tensor: torch.Tensor) -> Any:
    """The values of a tensor, row by row, as a buffer of bytes on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def write(path: Path, metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a task file, whole or not at all; or write it into a pipe or a device.

    Raises:
        AdapterError: the file cannot be written; nothing is left behind, and an older file of that name stays as it is.
    """
    said = {"format": FORMAT, "version": VERSION, **metadata}
    data = safetensors.torch.save(dict(tensors), {**said, "digest": _digest(said, tensors)})
    try:
        with written_whole(path) as file:
            file.write(data)
    except (OSError, ValueError) as error:  # a ValueError: a path that no file can have
        raise AdapterError(
            f"{path}: cannot be written: {_reason(error)}; name a file in a folder that you can write to."
        ) from error


def read(path: Path) -> Contents:
    """Metadata and tensors (on the CPU) of a task file.

    Raises:
        AdapterError: there is no such file, it is damaged or cut off, or it is no task file of this version.
    """
    try:
        # A pipe would wait for a writer; a device has no end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise AdapterError(f"{path}: is no file; name the file that save_adapter wrote.")
        with path.open("rb") as file:
            return _read(path, file, os.fstat(file.fileno()).st_size)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path}: cannot be read: {_reason(error)}. Name the file that save_adapter wrote.") from error


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _read(path: Path, file: BinaryIO, size: int) -> Contents:
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(size - 8, LARGEST_HEADER):
        raise _damaged(path, f"has {size} bytes and says that its header alone has {length}" if start else "is empty")
    text = file.read(length)
    try:
        header = json.loads(text.decode(), object_pairs_hook=_without_repetition, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is no JSON ({error})") from error
    metadata: Any = header.pop("__metadata__", None) if isinstance(header, dict) else None
    _check_metadata(path, metadata)
    if not _tile(header, size - 8 - length):
        raise _damaged(path, f"its tensors do not fill the {size - 8 - length} bytes after its header")
    try:
        tensors = safetensors.torch.load(start + text + file.read())
    except (SafetensorError, ArithmeticError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        raise _damaged(path, f"safetensors refuses it ({error})") from error
    if metadata.pop("digest", None) != _digest(metadata, tensors):
        raise _damaged(path, "its digest is not that of what it holds")
    return metadata, tensors


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} stands in it")


def _check_metadata(path: Path, metadata: Any) -> None:
    strings = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    if not strings or metadata.get("format") != FORMAT:
        raise AdapterError(f"{path}: is no task file of s2a_fx: its metadata does not say so. Name one that save_adapter wrote.")
    if (version := metadata.get("version")) != VERSION:
        raise AdapterError(f"{path}: is of version {version!r} of the format, this s2a_fx reads {VERSION!r}; install a newer one.")


def _tile(header: dict[str, Any], size: int) -> bool:
    """Whether the tensors' data lie side by side and fill so many bytes."""
    places = [_place(entry) for entry in header.values()]
    end = 0
    for start, stop in sorted(place or (-1, -1) for place in places):
        if start != end or stop < start:
            return False
        end = stop
    return end == size


def _place(entry: Any) -> tuple[int, int] | None:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in offsets):
        return None
    return offsets[0], offsets[1]


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def _damaged(path: Path, reason: str) -> AdapterError:
    return AdapterError(f"{path}: is damaged or cut off: {reason}. Copy it again from where it was saved, or save it again.")
