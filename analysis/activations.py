"""Which activation a node computes, however a model spells it."""

import operator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

aten = torch.ops.aten

_INF = float("inf")


class Activation(NamedTuple):
    """An activation by the name that `ops.activation` knows it by; `inplace` overwrites its operand."""

    name: str
    operand: fx.Node
    options: tuple[float, ...] = ()
    inplace: bool = False


_MODULES: dict[str, str] = {
    "SiLU": "silu",
    "Swish": "silu",
    "Mish": "mish",
    "Hardswish": "hardswish",
    "HardSwish": "hardswish",
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
    "SELU": "selu",
    "QuickGELU": "quick_gelu",
    "GELUTanh": "gelu_tanh",
    "ReLU": "relu",
    "ReLU6": "relu6",
    "Hardsigmoid": "hardsigmoid",
    "HardSigmoid": "hardsigmoid",
}
"""Class name, torch's or timm's -> activation without options."""

_FUNCTIONS: dict[Any, str] = {
    F.silu: "silu",
    aten.silu.default: "silu",
    F.mish: "mish",
    F.hardswish: "hardswish",
    F.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid",
    F.tanh: "tanh",
    torch.tanh: "tanh",
    F.selu: "selu",
    F.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    aten.relu.default: "relu",
    aten.relu_.default: "relu",
    F.relu6: "relu6",
    F.hardsigmoid: "hardsigmoid",
    "sigmoid": "sigmoid",
    "sigmoid_": "sigmoid",
    "tanh": "tanh",
    "relu": "relu",
    "relu_": "relu",
}
"""Function or method -> activation without options."""

_IN_PLACE = (torch.relu_, aten.relu_.default, "relu_", "sigmoid_")


def activation(gm: fx.GraphModule, node: fx.Node) -> Activation | None:
    """The activation that a node computes; None for any other node, and for options that no code serves (alpha, beta)."""
    if not node.all_input_nodes:
        return None
    operand = node.all_input_nodes[0]
    if node.op == "call_module":
        return _of_module(gm.get_submodule(str(node.target)), operand)
    if node.op not in ("call_function", "call_method") or node.args[:1] != (operand,):
        return None
    if node.target in (F.gelu, aten.gelu.default):
        return Activation(_gelu(_argument(node, 1, "approximate", "none")), operand)
    if node.target is F.leaky_relu:
        slope = _argument(node, 1, "negative_slope", 0.01)
        return Activation("leaky_relu", operand, (slope,), bool(_argument(node, 2, "inplace", False)))
    if node.target in (torch.clamp, "clamp", "clamp_"):
        bounds = _argument(node, 1, "min", None), _argument(node, 2, "max", None)
        if any(isinstance(b, fx.Node) for b in bounds):
            return None
        low, high = -_INF if bounds[0] is None else bounds[0], _INF if bounds[1] is None else bounds[1]
        return Activation("clamp", operand, (low, high), node.target == "clamp_")
    name = _FUNCTIONS.get(node.target)
    if name is None:
        return None
    return Activation(name, operand, (), node.target in _IN_PLACE or bool(_argument(node, 1, "inplace", False)))


def _of_module(module: nn.Module, operand: fx.Node) -> Activation | None:
    name = type(module).__name__
    inplace = bool(getattr(module, "inplace", False))
    if name == "GELU":
        return Activation(_gelu(getattr(module, "approximate", "none")), operand)
    if isinstance(module, nn.LeakyReLU):
        return Activation("leaky_relu", operand, (module.negative_slope,), inplace)
    if type(module) is nn.Hardtanh:
        return Activation("hardtanh", operand, (module.min_val, module.max_val), inplace)
    if isinstance(module, nn.ELU):
        return Activation("elu", operand, (), inplace) if module.alpha == 1 else None
    if isinstance(module, nn.Softplus):
        return Activation("softplus", operand) if (module.beta, module.threshold) == (1, 20) else None
    if name in _MODULES and type(module).__module__.startswith(("torch.nn", "timm.layers")):
        return Activation(_MODULES[name], operand, (), inplace)
    return None


def _gelu(approximate: str) -> str:
    return "gelu_tanh" if approximate == "tanh" else "gelu"


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.kwargs.get(name, node.args[position] if position < len(node.args) else default)


def is_product(node: fx.Node) -> bool:
    """Whether a node multiplies two activations elementwise."""
    return node.target in (operator.mul, torch.mul, "mul") and len(node.all_input_nodes) == 2
