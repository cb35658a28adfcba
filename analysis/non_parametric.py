"""The layers without parameters whose backward needs an activation: GELU, SiLU, ReLU, softmax, attention.

However a model spells them (module, function, method, ATen operator), `non_parametric` tells what they are, what they read, and
with which options. One table for each spelling.
"""

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from s2a_fx.graph.training_switch import TrainingSwitch

aten = torch.ops.aten

_MATMULS = (operator.matmul, torch.matmul, torch.bmm, "matmul", "bmm", aten.matmul.default)


@dataclass(frozen=True)
class NonParametric:
    """A non-parametric layer.

    Attributes:
        kind: `gelu`, `silu`, `relu`, `softmax` or `attention`.
        node: the node that computes it.
        operands: the nodes it reads; for attention query, key, value and, if it has one, the mask.
        options: `approximate`; `inplace`; `dim`; `dropout_p`, `eval_dropout_p`, `is_causal`, `scale`, by kind.
    """

    kind: str
    node: fx.Node
    operands: tuple[fx.Node, ...]
    options: dict[str, Any]


class _Call(NamedTuple):
    """A call with its arguments, and what the training mode changes in them."""

    node: fx.Node
    inference: dict[int | str, Any]

    def argument(self, position: int, name: str, default: Any = None, inference: bool = False) -> Any:
        for key in (position, name):
            if inference and key in self.inference:
                return self.inference[key]
        if name in self.node.kwargs:
            return self.node.kwargs[name]
        return self.node.args[position] if position < len(self.node.args) else default


def _gelu(call: _Call) -> dict[str, Any]:
    return {"approximate": call.argument(1, "approximate", "none")}


def _plain(call: _Call) -> dict[str, Any]:
    return {"inplace": bool(call.argument(1, "inplace", False))}


def _in_place(call: _Call) -> dict[str, Any]:
    return {"inplace": True}


def _out_of_place(call: _Call) -> dict[str, Any]:
    return {"inplace": False}


def _softmax(call: _Call) -> dict[str, Any]:
    return {"dim": call.argument(1, "dim"), "dtype": call.argument(3, "dtype")}


def _softmax_method(call: _Call) -> dict[str, Any]:
    return {"dim": call.argument(1, "dim"), "dtype": call.argument(2, "dtype")}


def _attention(call: _Call) -> dict[str, Any]:
    return {
        "dropout_p": call.argument(4, "dropout_p", 0.0),
        "eval_dropout_p": call.argument(4, "dropout_p", 0.0, inference=True),
        "is_causal": call.argument(5, "is_causal", False),
        "scale": call.argument(6, "scale"),
        "enable_gqa": call.argument(7, "enable_gqa", False),
    }


_Entry = tuple[str, Callable[[_Call], dict[str, Any]]]  # the kind, and how to read its options from a call

_FUNCTIONS: dict[Any, _Entry] = {
    F.gelu: ("gelu", _gelu),
    aten.gelu.default: ("gelu", _gelu),
    F.silu: ("silu", _plain),
    aten.silu.default: ("silu", _out_of_place),
    aten.silu_.default: ("silu", _in_place),
    F.relu: ("relu", _plain),
    torch.relu: ("relu", _out_of_place),
    torch.relu_: ("relu", _in_place),
    aten.relu.default: ("relu", _out_of_place),
    aten.relu_.default: ("relu", _in_place),
    F.softmax: ("softmax", _softmax),
    torch.softmax: ("softmax", _softmax_method),
    aten.softmax.int: ("softmax", _softmax_method),
    F.scaled_dot_product_attention: ("attention", _attention),
    aten.scaled_dot_product_attention.default: ("attention", _attention),
}
_METHODS: dict[Any, _Entry] = {
    "relu": ("relu", _out_of_place),
    "relu_": ("relu", _in_place),
    "softmax": ("softmax", _softmax_method),
}
_MODULES: dict[type[nn.Module], tuple[str, tuple[str, ...]]] = {
    nn.GELU: ("gelu", ("approximate",)),
    nn.SiLU: ("silu", ("inplace",)),
    nn.ReLU: ("relu", ("inplace",)),
    nn.Softmax: ("softmax", ("dim",)),
}


def non_parametric(gm: fx.GraphModule, node: fx.Node) -> NonParametric | None:
    """What non-parametric layer a node is; None for any other node."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        if isinstance(module, TrainingSwitch):
            return _from_table(_FUNCTIONS.get(module.function), _Call(node, {d.argument: d.eval for d in module.differences}))
        kind, attributes = _MODULES.get(type(module), ("", ()))
        if not kind:
            return None
        return NonParametric(kind, node, (node.all_input_nodes[0],), {a: getattr(module, a) for a in attributes})
    table: dict[Any, _Entry] = {"call_function": _FUNCTIONS, "call_method": _METHODS}.get(node.op, {})
    return _from_table(table.get(node.target), _Call(node, {}))


def _from_table(entry: _Entry | None, call: _Call) -> NonParametric | None:
    if entry is None:
        return None
    kind, read_options = entry
    names: Iterable[str] = ("query", "key", "value", "attn_mask") if kind == "attention" else ("input",)
    operands = [call.argument(position, name) for position, name in enumerate(names)]
    nodes = tuple(operand for operand in operands if isinstance(operand, fx.Node))
    return NonParametric(kind, call.node, nodes, read_options(call))


def dropout_probability(gm: fx.GraphModule, node: fx.Node) -> float | None:
    """p of a dropout that draws in train mode only, 0 for an identity; None for any other node."""
    if node.op != "call_module":
        return None
    module: Any = gm.get_submodule(str(node.target))
    if isinstance(module, nn.Identity):
        return 0.0
    if type(module) is nn.Dropout:
        return module.p
    if isinstance(module, TrainingSwitch) and module.function is F.dropout:
        arguments = dict(zip(("input", "p", "training"), node.args, strict=False)) | dict(node.kwargs)
        switched = {d.argument: (d.train, d.eval) for d in module.differences}
        if switched.keys() <= {"training", 2} and next(iter(switched.values()), None) == (True, False):
            return float(arguments.get("p", 0.5))  # type: ignore[arg-type]
    return None


def product_with_values(gm: fx.GraphModule, softmax: fx.Node) -> tuple[fx.Node, fx.Node, float] | None:
    """The product, the values and the dropout's p in `dropout(softmax) @ values`; None where the map is read otherwise.

    The softmax runs over the last dimension, in its operand's dtype.
    """
    layer = non_parametric(gm, softmax)
    if layer is None or layer.options["dim"] not in (-1, softmax.meta["val"].ndim - 1) or layer.options.get("dtype") is not None:
        return None
    node, dropout_p = softmax, 0.0
    while len(node.users) == 1:
        (user,) = node.users
        drop = dropout_probability(gm, user)
        if drop is not None:
            dropout_p = 1 - (1 - dropout_p) * (1 - drop) if not dropout_p or not drop else None  # type: ignore[assignment]
            if dropout_p is None:
                return None
            node = user
            continue
        if user.target not in _MATMULS or user.args[0] is not node or not isinstance(user.args[1], fx.Node):
            return None
        value = user.args[1]
        return (user, value, dropout_p) if value.meta["val"].shape[:-2] == softmax.meta["val"].shape[:-2] else None
    return None
