"""A tensor as rows of a fixed width, in the order in which it lies in memory: what codes are packed from.

A row may be of two images. Where elements share a range, `groups` are of one, so that an image's gradient does not depend on what
other images are in the batch.
"""

import math

import torch

_WIDTHS = (1024, 64, 8)  # few, since a kernel is compiled for each; the last resort is the middle one, padded


def width_of(numel: int) -> int:
    """The width of the rows into which `numel` elements are laid."""
    return next((w for w in _WIDTHS if numel % w == 0), 64)


def row_count(numel: int) -> tuple[int, int]:
    """The (rows, width) into which `numel` elements are laid."""
    width = width_of(numel)
    return (numel // width if numel % width == 0 else numel // width + 1), width


def rows(x: torch.Tensor, width: int = 0) -> torch.Tensor:
    """`x` as (rows, width), a view where `x` is dense; its last element fills the last row up where the width does not divide."""
    return _filled(_dense(x).reshape(1, -1), width or width_of(x.numel()))


def groups(x: torch.Tensor, width: int) -> torch.Tensor:
    """`x` (images, ...) as (rows, width), those of an image together; its last element fills its last row up."""
    return _filled(_dense(x).flatten(1), width)


def _filled(flat: torch.Tensor, width: int) -> torch.Tensor:
    """(n, size) as (rows, width), the last element of each of the n in what its last row has left."""
    missing = -flat.shape[1] % width
    if missing:
        flat = torch.cat((flat, flat[:, -1:].expand(-1, missing)), 1)
    return flat.view(-1, width)


def restore(values: torch.Tensor, shape: torch.Size, channels_last: bool) -> torch.Tensor:
    """The tensor of `shape` that `rows` were made of."""
    flat, count = values.reshape(-1), math.prod(shape)  # torch.Size's own count would fix a symbolic batch
    return _shaped(flat if flat.numel() == count else flat[:count], shape, channels_last)


def restore_groups(values: torch.Tensor, shape: torch.Size, channels_last: bool) -> torch.Tensor:
    """The tensor of `shape` that `groups` were made of."""
    size = math.prod(shape[1:])
    flat = values.reshape(-1) if size % values.shape[-1] == 0 else values.reshape(shape[0], -1)[:, :size].reshape(-1)
    return _shaped(flat, shape, channels_last)


def _shaped(flat: torch.Tensor, shape: torch.Size, channels_last: bool) -> torch.Tensor:
    if channels_last:
        batch, channels, height, width = shape
        return flat.view(batch, height, width, channels).permute(0, 3, 1, 2)
    return flat.view(shape)


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether `x` lies in memory channels last, and not contiguously."""
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1) if is_channels_last(x) else x.contiguous()
