"""Which activation or dropout a node computes, by the name that `ops.activation` knows it by."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers.activations import quick_gelu
from torch import fx, nn

from s2a_fx.graph.calls import Call, call_of


class Activation(NamedTuple):
    """An activation by the name that `ops.activation` knows it by; `inplace` overwrites its operand."""

    name: str
    operand: fx.Node
    options: tuple[float, ...] = ()
    inplace: bool = False


_PLAIN: dict[Any, str] = {
    F.silu: "silu",
    F.mish: "mish",
    F.hardswish: "hardswish",
    torch.sigmoid: "sigmoid",
    torch.tanh: "tanh",
    F.selu: "selu",
    quick_gelu: "quick_gelu",
    F.relu: "relu",
    F.relu6: "relu6",
    F.hardsigmoid: "hardsigmoid",
}
"""Operator -> activation without options."""


def _clamp(low: float | None, high: float | None) -> tuple[str, tuple[float, ...]]:
    return "clamp", (-float("inf") if low is None else low, float("inf") if high is None else high)


_WITH_OPTIONS: dict[Any, Callable[..., tuple[str, tuple[float, ...]] | None]] = {
    F.gelu: lambda approximate: ("gelu_tanh" if approximate == "tanh" else "gelu", ()),
    F.leaky_relu: lambda negative_slope: ("leaky_relu", (negative_slope,)),
    F.hardtanh: lambda min_val, max_val: ("hardtanh", (min_val, max_val)),
    torch.clamp: lambda **bounds: _clamp(bounds["min"], bounds["max"]),
    F.elu: lambda alpha: ("elu", ()) if alpha == 1 else None,
    F.softplus: lambda beta, threshold: ("softplus", ()) if (beta, threshold) == (1, 20) else None,
}
"""Operator -> how its options tell the activation; None for options that no code serves."""


def activation(gm: fx.GraphModule, node: fx.Node) -> Activation | None:
    """The activation that a node computes; None for any other node, and for options that no code serves (alpha, beta)."""
    call = call_of(gm, node)
    if call is None or call.operands.keys() != {"input"}:
        return None
    inplace = call.in_place == "input"
    if call.operator in _PLAIN:
        return Activation(_PLAIN[call.operator], call.input, (), inplace)
    told = _WITH_OPTIONS[call.operator](**call.options) if call.operator in _WITH_OPTIONS else None
    return None if told is None else Activation(told[0], call.input, told[1], inplace)


def dropout_probability(call: Call | None) -> float | None:
    """p of a dropout that draws in train mode only, 0 for an identity; None for any other call."""
    if call is not None and call.operator is nn.Identity:
        return 0.0
    if call is None or call.operator is not F.dropout or (call.options["training"], call.eval_options["training"]) != (True, False):
        return None
    return float(call.options["p"])
