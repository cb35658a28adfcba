"""Layers that keep a few bits for the backward, one for each operator of the compression engine.

Each computes exactly what the layer that it replaces computes. Where no gradient is needed it is that layer, its `inference_form`:
nothing is coded.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from s2a_fx.nn.random_numbers import Drawing
from s2a_fx.nn.recompute import needs_grad
from s2a_fx.ops import activation
from s2a_fx.ops.dropout import dropout
from s2a_fx.ops.frozen_convolution import frozen_convolution
from s2a_fx.ops.layer_norm import layer_norm
from s2a_fx.ops.normalize import plain_norm


class CodedActivation(nn.Module):
    """An activation with a smooth derivative (`ops.activation.BINNED` names them) that keeps `bits` an element."""

    def __init__(self, name: str, bits: int = 4) -> None:
        super().__init__()
        self.name, self.bits = name, bits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return activation.binned(x, self.name, self.bits)[0] if needs_grad(x) else self.inference_form(x)

    def inference_form(self, x: torch.Tensor) -> torch.Tensor:
        return activation.BINNED[self.name](x)

    def extra_repr(self) -> str:
        return f"{self.name}, bits={self.bits}"


class MaskedActivation(nn.Module):
    """An activation whose derivative has two values (`ops.activation.masked_rule` names them): one bit an element, exact."""

    def __init__(self, name: str, options: tuple[float, ...] = ()) -> None:
        super().__init__()
        self.name, self.options = name, options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if needs_grad(x):
            return activation.masked(x, self.name, list(self.options))[0]
        return self.inference_form(x)

    def inference_form(self, x: torch.Tensor) -> torch.Tensor:
        return activation.masked_rule(self.name, list(self.options)).function(x)

    def extra_repr(self) -> str:
        return ", ".join([self.name, *map(str, self.options)])


class CodedDropout(Drawing):
    """Dropout that keeps one bit an element; exact."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and self.p > 0 and needs_grad(x):
            return dropout(x, self.p)[0]
        return F.dropout(x, self.p, self.training)

    def inference_form(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def draws(self) -> bool:
        return self.p > 0

    def extra_repr(self) -> str:
        return f"p={self.p}"


class CodedLayerNorm(nn.Module):
    """Layer norm, or RMS norm (`centered` False), over the last dimension, that keeps `bits` an element and 1 / sigma a row."""

    def __init__(self, eps: float, centered: bool = True, bits: int = 4) -> None:
        super().__init__()
        self.eps, self.centered, self.bits = eps, centered, bits

    def forward(self, x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None) -> torch.Tensor:
        if needs_grad(x, weight, bias):
            return layer_norm(x, weight, bias, self.eps, self.centered, self.bits)[0]
        return self.inference_form(x, weight, bias)

    def inference_form(self, x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None) -> torch.Tensor:
        return plain_norm(x, weight, bias, self.eps, self.centered)

    def extra_repr(self) -> str:
        return f"eps={self.eps}, centered={self.centered}, bits={self.bits}"


CONVOLUTIONS: dict[int, Callable[..., torch.Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
"""By dimensions of a map. Autocast knows them, unlike `torch.convolution`."""


class FrozenConvolution(nn.Module):
    """A convolution whose weight is frozen: it keeps nothing. Exact."""

    def __init__(self, stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...], groups: int) -> None:
        super().__init__()
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups

    def forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if weight.requires_grad:  # thawed since: the plain convolution trains it
            return self.inference_form(x, weight, bias)
        if torch.is_autocast_enabled(x.device.type):  # asked here: inside an operator a compiler does not see it
            x = x.to(torch.get_autocast_dtype(x.device.type))
        options = (list(self.stride), list(self.padding), list(self.dilation))
        return frozen_convolution(x, weight, bias, *options, self.groups)  # type: ignore[no-any-return]

    def inference_form(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return CONVOLUTIONS[len(self.stride)](x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        return f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, groups={self.groups}"
