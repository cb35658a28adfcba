"""Tensors that are spread over processes (FSDP2), and what they are as a whole."""

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


def is_spread(module: nn.Module) -> bool:
    """Whether any of a module's parameters is spread over processes."""
    return any(isinstance(p, DTensor) for p in module.parameters())


def whole(value: Any) -> Any:
    """What all processes have of a tensor that is spread, each of which must call this; anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def laid_out_like(target: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The value, which every process has as a whole, on the target's device, and spread as the target is."""
    if isinstance(target, DTensor):
        mesh = target.device_mesh
        return distribute_tensor(value.to(mesh.device_type), mesh, target.placements, src_data_rank=None)
    return value.to(target.device)
