"""Digests of a model's tensors, by which a task file knows the base that it was trained on."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdKeyDictionary

from s2a_fx.errors import AdapterError
from s2a_fx.graph import torch_internals
from s2a_fx.graph.torch_internals import FakeTensor
from s2a_fx.sharded import whole
from s2a_fx.tasks.task_file import bytes_of

_known: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Tensor -> the state it was in, and its digest then: a base with many tasks is read once, not at every change of the task."""


def digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Name -> dtype, shape and sha256 of the values.

    A tensor that is known is not read again. What is written past autograd's count of versions, by `tensor.data.add_(1)`, goes
    unseen.

    Raises:
        AdapterError: a tensor has no values (meta device).
    """
    return {name: _digest(name, tensor) for name, tensor in tensors.items()}


def fingerprint(of_each: Mapping[str, str]) -> str:
    """One sha256 for all digests."""
    return hashlib.sha256(json.dumps(of_each, sort_keys=True).encode()).hexdigest()


def require_values(name: str, tensor: torch.Tensor) -> None:
    """Raise `AdapterError` for a tensor without values."""
    if tensor.is_meta or isinstance(tensor, FakeTensor):
        raise AdapterError(f"{name} has no values (meta device or fake tensor); build the model with its weights.")


def _digest(name: str, tensor: torch.Tensor) -> str:
    require_values(name, tensor)
    state = _state(tensor)
    known = _known.get(tensor)
    if known is not None and state is not None and known[0] == state:
        return known[1]  # type: ignore[no-any-return]
    values = hashlib.sha256(bytes_of(whole(tensor))).hexdigest()
    found = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} {values}"
    _known[tensor] = state, found
    return found


def _state(tensor: torch.Tensor) -> Any:
    """What changes when the values do; None for tensors of inference mode, which are not counted."""
    local = torch_internals.local_part(tensor) if isinstance(tensor, DTensor) else tensor
    if local.is_inference():
        return None
    storage = StorageWeakRef(local.untyped_storage())  # its address would be that of another storage, once this one is freed
    return storage, torch_internals.version_of(local), local.storage_offset(), local.dtype, tuple(local.shape), local.stride()


def persistent(model: nn.Module) -> dict[str, torch.Tensor]:
    """What the model's state dict holds; a tensor of several names under its first."""
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, torch.Tensor):
            found.setdefault(id(value), (name, value))
    return dict(found.values())
