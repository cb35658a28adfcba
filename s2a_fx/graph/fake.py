"""Modules and inputs whose tensors have a shape, a dtype and a storage of the right size, and no memory behind them."""

import copy
from typing import Any

import torch
from torch import fx, nn

from s2a_fx.graph import torch_internals
from s2a_fx.graph.regions import modules_within
from s2a_fx.graph.torch_internals import FakeTensorMode


def fake_mode() -> FakeTensorMode:
    """A fresh mode. Tensors hidden in plain attributes stay real: `allow_non_fake_inputs`."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_tensor(tensor: torch.Tensor, mode: FakeTensorMode, batch_size: int | None = None) -> torch.Tensor:
    """A fake CPU tensor of the same shape, strides and dtype, whatever `tensor` is: real, meta, or fake under another mode.

    With `batch_size`, the first dimension is replaced and the result is contiguous.
    """
    shape = tuple(tensor.shape) if batch_size is None else (batch_size, *tensor.shape[1:])
    stride = tensor.stride() if batch_size is None else None
    return torch_internals.make_fake(mode, shape, stride, tensor.dtype, tensor.requires_grad, isinstance(tensor, nn.Parameter))


def needs_fake_copy(module: nn.Module) -> bool:
    """Whether a module runs on fake tensors only as a `fake_copy`: exchanging its parameters and buffers is not enough."""
    return any(map(_counts_batches, modules_within(module))) or bool(torch_internals.normalized_weights(module))


def fake_copy(module: nn.Module, memo: dict[int, Any]) -> Any:
    """A deep copy of a module that runs on fake tensors: those that `memo` has in the place of the module's own.

    A norm with `momentum=None` reads how many batches it has seen, and weighs this one by the inverse. Fake tensors have no number
    to read: the weight is 1. What hooks compute before the module runs is left out.
    """
    memo |= {id(t): None for t in torch_internals.normalized_weights(module)}
    copied = copy.deepcopy(module, memo)
    for inner in modules_within(copied):
        if isinstance(inner, torch_internals.RunningNorm) and _counts_batches(inner):
            inner.momentum = 1.0
    return copied


def _counts_batches(module: nn.Module) -> bool:
    return isinstance(module, torch_internals.RunningNorm) and module.momentum is None


def fake_modules(gm: fx.GraphModule, mode: FakeTensorMode) -> nn.Module:
    """The modules of a graph module, without the graph, their parameters and buffers faked; tied tensors stay tied."""
    memo: dict[int, Any] = {id(t): fake_tensor(t, mode) for t in [*gm.parameters(), *gm.buffers()]}
    root = nn.Module()
    for name, child in gm.named_children():
        root.add_module(name, fake_copy(child, memo))
    for name, parameter in gm.named_parameters(recurse=False):
        root.register_parameter(name, memo[id(parameter)])
    for name, buffer in gm.named_buffers(recurse=False):
        root.register_buffer(name, memo[id(buffer)])
    return root


def traced_inputs(gm: fx.GraphModule) -> tuple[torch.Tensor, ...]:
    """The fake inputs that the graph's shapes were computed from."""
    return tuple(node.meta["val"] for node in gm.graph.nodes if node.op == "placeholder")
