"""Layers without a forward: what is computed again for its gradients does not need the values of its last layer."""

from collections.abc import Sequence
from typing import Any

import timm.layers
import torch
from torch import fx, nn

from s2a_fx.graph import torch_internals
from s2a_fx.graph.edit import extract_region
from s2a_fx.graph.regions import SCOPES, scopes_of
from s2a_fx.graph.scopes import close_scopes, scopes_around


def can_be_ghost(module: nn.Module | None) -> bool:
    """Whether a module is a plain linear layer or convolution, without hooks: what `Ghost` knows the backward of."""
    if module is None or torch_internals.has_hooks(module) or hasattr(module, "parametrizations"):
        return False
    if type(module) in (nn.Linear, timm.layers.Linear):
        return True
    plain = type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return plain and module.padding_mode == "zeros" and not isinstance(module.padding, str)


class Ghost(nn.Module):
    """A linear layer or convolution whose output's values nobody reads: its forward computes none, its backward is the layer's."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # not registered: it keeps its one name in the state dict

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer: Any = self.__dict__["layer"]
        if isinstance(layer, nn.Linear):
            return _GhostLinear.apply(x, layer.weight, layer.bias)  # type: ignore[no-any-return]
        options = (layer.stride, layer.padding, layer.dilation, layer.groups)
        return _GhostConvolution.apply(x, layer.weight, layer.bias, *options)  # type: ignore[no-any-return]


class _GhostLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        ctx.dtype = x.dtype
        return x.new_empty(1).expand(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_weight = None if x is None else (rows.mT @ x.flatten(0, -2).to(grad.dtype)).to(weight.dtype)
        grad_bias = rows.sum(0).to(weight.dtype) if ctx.needs_input_grad[2] else None
        grad_x = (grad @ weight.to(grad.dtype)).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, grad_weight, grad_bias


class _GhostConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *options: Any) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options = options
        ctx.bias_sizes = None if bias is None else [weight.shape[0]]
        sizes = [
            (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for size, stride, pad, dilation, kernel in zip(x.shape[2:], *options[:3], weight.shape[2:], strict=True)
        ]
        return x.new_empty(1).expand(x.shape[0], weight.shape[0], *sizes)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.options
        gradients = torch.ops.aten.convolution_backward(
            grad, x.to(grad.dtype), weight.to(grad.dtype), ctx.bias_sizes, stride, padding, dilation, False,
            [0] * len(stride), groups, list(ctx.needs_input_grad[:3]),
        )  # fmt: skip
        kinds = (x.dtype, weight.dtype, weight.dtype)
        return *(None if g is None else g.to(kind) for g, kind in zip(gradients, kinds, strict=True)), None, None, None, None


def extract_bodies(
    gm: fx.GraphModule, nodes: Sequence[fx.Node], operands: Sequence[fx.Node], tail: fx.Node | None
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The function from `operands` to the last of `nodes`; and the same with the layer `tail` as a `Ghost`, for the backward.

    Its call belongs into the scopes that all nodes are in.
    """
    body, copies = extract_region(gm, nodes, operands)
    _close_inner_scopes(body, nodes, copies)
    if tail is None:
        return body, body
    backward_body, copies = extract_region(gm, nodes, operands)
    backward_body.add_submodule("ghost", Ghost(gm.get_submodule(str(tail.target))))
    copies[tail].target = "ghost"
    backward_body.delete_all_unused_submodules()
    _close_inner_scopes(backward_body, nodes, copies)
    return body, backward_body


def _close_inner_scopes(body: fx.GraphModule, nodes: Sequence[fx.Node], copies: dict[fx.Node, fx.Node]) -> None:
    """Make modules of the scopes that some of a body's nodes are in; those around all are around the body's call."""
    around = scopes_around(nodes)
    for node in nodes:
        copies[node].meta[SCOPES] = scopes_of(node)[len(around) :]
    close_scopes(body)
    body.recompile()
