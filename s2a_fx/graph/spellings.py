"""How a target is spelled: the ATen operator behind a function, or a method by its name, and how its arguments are bound.

    F.layer_norm, torch.layer_norm, torch.ops.aten.layer_norm.default     layer_norm
    operator.add, operator.iadd, torch.add, "add", "add_"                 add
    "view", torch.reshape                                                 reshape

ATen's schemas tell the parameters; the tables below say only what no schema knows.
"""

import functools
import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import timm.layers.activations
import torch
import torch.nn.functional as F
from timm.layers.drop import drop_path
from torch import fx

from s2a_fx.graph import torch_internals
from s2a_fx.graph.torch_internals import Parameter, Schema, aten_name, aten_schemas, schema_of

Function = Callable[..., Any]

_SYNONYMS: dict[str, str] = {
    **dict.fromkeys(("mm", "bmm"), "matmul"),
    **dict.fromkeys(("concat", "concatenate"), "cat"),
    **dict.fromkeys(("swapaxes", "swapdims"), "transpose"),
    **dict.fromkeys(("divide", "true_divide"), "div"),
    **dict.fromkeys(("view", "_unsafe_view"), "reshape"),
    "clip": "clamp",
    "moveaxis": "movedim",
    "multiply": "mul",
    "subtract": "sub",
    "special_expit": "sigmoid",
    "special_log_softmax": "log_softmax",
    "special_softmax": "softmax",
    "special_logit": "logit",
}
"""ATen operator -> the one that computes the same."""

_RENAMED: dict[str, str] = {
    "self": "input",
    "mat2": "other",
    "train": "training",
    "axis": "dim",
    "keepdims": "keepdim",
    "axis0": "dim0",
    "axis1": "dim1",
}
"""A parameter's name in a schema, or as NumPy has it -> its name in torch's functions."""

_RENAMED_IN: dict[tuple[str, str], str] = {("view", "size"): "shape", ("_unsafe_view", "size"): "shape"}
"""The same for a parameter of one ATen operator."""

LEFT_OUT = ("inplace", "out", "generator", "cudnn_enable", "cudnn_enabled", "_stacklevel")
"""Parameters that change nothing of what is computed; the first two make `in_place`."""

_BINARY: dict[str, tuple[Function, Function | None]] = {
    "add": (operator.add, operator.iadd),
    "sub": (operator.sub, operator.isub),
    "mul": (operator.mul, operator.imul),
    "div": (operator.truediv, operator.itruediv),
    "floor_divide": (operator.floordiv, operator.ifloordiv),
    "remainder": (operator.mod, operator.imod),
    "matmul": (operator.matmul, None),
    "pow": (operator.pow, operator.ipow),
    "bitwise_and": (operator.and_, operator.iand),
    "bitwise_or": (operator.or_, operator.ior),
    "bitwise_xor": (operator.xor, operator.ixor),
    "bitwise_left_shift": (operator.lshift, operator.ilshift),
    "bitwise_right_shift": (operator.rshift, operator.irshift),
    "eq": (operator.eq, None),
    "ne": (operator.ne, None),
    "lt": (operator.lt, None),
    "le": (operator.le, None),
    "gt": (operator.gt, None),
    "ge": (operator.ge, None),
}
"""ATen operator -> Python's of two operands: the one that computes, and the one that writes to its first operand."""

ASSIGNMENTS: dict[Function, Function] = {writing: plain for plain, writing in _BINARY.values() if writing is not None}
"""Python's operator that writes to its first operand -> the one that computes the same."""

ASSIGNED_NAMES: dict[str, str] = {f"{name}_": name for name, (_, writing) in _BINARY.items() if writing is not None}
"""The same by ATen's names."""

_PYTHON: dict[Function, tuple[str, str | None]] = {
    **{plain: (name, None) for name, (plain, _) in _BINARY.items()},
    **{writing: (name, "input") for name, (_, writing) in _BINARY.items() if writing is not None},
    operator.imatmul: ("matmul", None),  # tensors have none of their own: Python takes `x = x @ y` for it
    operator.neg: ("neg", None),
    operator.invert: ("bitwise_not", None),
    operator.getitem: ("getitem", None),
    operator.setitem: ("setitem", "input"),
}
"""Python's operators -> the ATen operator, and what it writes to."""

ATTRIBUTES = {"T": "numpy_T", "mT": "mT", "H": "matrix_H", "mH": "mH"}
"""Attributes of a tensor that are operators -> their names in ATen."""

_FUNCTIONS: dict[str, Function] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "log_sigmoid": F.logsigmoid,
    "getitem": operator.getitem,
    "setitem": operator.setitem,
}
"""ATen operator -> its function, where it is not that of `torch.nn.functional`, or else of `torch`, or else of `torch.Tensor`."""

_SIGNATURES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_BINARY, ("input", "other")),
    "pow": ("input", "exponent"),
    "neg": ("input",),
    "bitwise_not": ("input",),
    "getitem": ("input", "index"),
    "setitem": ("input", "index", "value"),
}
"""The parameters of Python's operators."""

_COMMUTATIVE = (operator.add, operator.mul)

DISPATCHED: dict[Function, Function] = {
    F.max_pool1d: F.max_pool1d_with_indices,
    F.max_pool2d: F.max_pool2d_with_indices,
    F.max_pool3d: F.max_pool3d_with_indices,
    F.adaptive_max_pool1d: F.adaptive_max_pool1d_with_indices,
    F.adaptive_max_pool2d: F.adaptive_max_pool2d_with_indices,
    F.adaptive_max_pool3d: F.adaptive_max_pool3d_with_indices,
    F.fractional_max_pool2d: F.fractional_max_pool2d_with_indices,
    F.fractional_max_pool3d: F.fractional_max_pool3d_with_indices,
}
"""Functions that hide their parameters -> one that has the same."""

DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, drop_path)
"""Operators that do nothing where they do not train."""

PROBABILITIES: dict[Function, str] = {
    **dict.fromkeys(DROPOUTS, "p"),
    F.scaled_dot_product_attention: "dropout_p",
    F.multi_head_attention_forward: "dropout_p",
    drop_path: "drop_prob",
}
"""Operators that draw only where this option is not 0."""

DRAWING = (F.gumbel_softmax, F.fractional_max_pool2d, F.fractional_max_pool3d)
"""Functions written in Python that draw, which no schema tells."""


class Bound(NamedTuple):
    """Arguments by the parameters' names, what is written to, and the schema if one was chosen."""

    arguments: dict[str, Any]
    in_place: str | None
    schema: Schema | None


@dataclass(frozen=True)
class Spelling:
    """One way to write an operator: the ATen operator's name without the underscore of in-place forms, and how to bind."""

    name: str
    operator: Function
    bind: Callable[[tuple[Any, ...], dict[str, Any]], Bound | None]


@functools.cache
def spelling(target: Function | str) -> Spelling | None:
    """How a function, or a method by its name, is bound; None for what is no operator of torch's."""
    if not isinstance(target, str):
        if target in _PYTHON:
            name, in_place = _PYTHON[target]
            return Spelling(name, function_of(name), functools.partial(_bind_python, target, in_place))
        if target in (drop_path, timm.layers.activations.quick_gelu):
            return Spelling(target.__name__, target, functools.partial(_bind_signature, target))
        if _is_python(target):
            name = target.__name__
            return Spelling(name, function_of(name), functools.partial(_bind_signature, DISPATCHED.get(target, target)))
    schemas = schemas_of(target)
    if not schemas:
        return None
    name = _functional_name(schemas[0])
    function = function_of(name)
    if function is None:
        return None
    return Spelling(name, function, functools.partial(_bind_schemas, schemas, isinstance(target, torch_internals.Overload)))


def schemas_of(target: Function | str) -> tuple[Schema, ...]:
    """The overloads of ATen that a function, or a method by its name, may call; none for what is written in Python."""
    if isinstance(target, torch_internals.Overload):
        return (schema_of(target),) if aten_name(target) else ()
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    is_method = isinstance(target, str) or target is getattr(torch.Tensor, name, None)
    schemas = aten_schemas(name if is_method else aten_name(target) or "")  # type: ignore[arg-type]
    return tuple(schema for schema in schemas if (schema.operator, schema.overload) != ("view", "dtype"))  # a cast


def _is_python(function: Function) -> bool:
    """Whether a function is one of `torch.nn.functional`, or one of `torch` that stands for an ATen operator, written in Python."""
    name = getattr(function, "__name__", "")
    homes = (getattr(F, name, None), getattr(torch, name, None))
    return inspect.isfunction(function) and function in homes and bool(function_of(name))


def _functional_name(schema: Schema) -> str:
    """ATen's name of the operator that computes the same and writes to nothing: ATen names in-place forms by an underscore."""
    name = schema.operator
    if schema.parameters and schema.parameters[0].is_written and aten_schemas(name.removesuffix("_")):
        name = name.removesuffix("_")
    return _SYNONYMS.get(name, name)


@functools.cache
def function_of(name: str) -> Any:
    """The function of an operator: that of `torch.nn.functional`, or else of `torch`, of `torch.Tensor`, or ATen's own."""
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    for home in (F, torch, torch.Tensor):
        found = getattr(home, name, None)
        if callable(found) and (aten_schemas(name) or getattr(found, "__module__", None) == F.__name__):
            return found
    return getattr(torch.ops.aten, name, None) if aten_schemas(name) else None


def name_of(parameter: Parameter, schema: Schema) -> str:
    return _RENAMED_IN.get((schema.operator, parameter.name), _RENAMED.get(parameter.name, parameter.name))


def _bind_python(target: Function, in_place: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound | None:
    names = _SIGNATURES[_PYTHON[target][0]]
    if len(args) != len(names) or kwargs:
        return None
    if target in _COMMUTATIVE and not isinstance(args[0], fx.Node):
        args = args[::-1]
    return Bound(dict(zip(names, args, strict=True)), in_place, None)


@functools.cache
def signature_of(function: Function) -> inspect.Signature:
    return inspect.signature(function)


def _bind_signature(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound | None:
    try:
        bound = signature_of(function).bind(*args, **kwargs)
    except TypeError:
        return None
    first = next(iter(signature_of(function).parameters))
    arguments = {("input" if name == first and name in ("x", "input") else name): v for name, v in bound.arguments.items()}
    in_place = "input" if arguments.get("inplace") else "out" if arguments.get("out") is not None else None
    return Bound(arguments, in_place, None)


def _bind_schemas(schemas: tuple[Schema, ...], chosen: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound | None:
    """Bind to the first overload that takes the arguments; `chosen`: there is but one, whose types are not asked."""
    for schema in schemas:
        arguments = _bind_schema(schema, args, kwargs)
        if arguments is None:
            continue
        parameters = {name_of(p, schema): p for p in schema.parameters}
        if chosen or all(_fits(parameters[name], value) for name, value in arguments.items()):
            written = next((name for name, p in parameters.items() if p.is_written), None)
            return Bound(arguments, written, schema)
    return None


def _bind_schema(schema: Schema, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    positional = [p for p in schema.parameters if not p.is_keyword]
    values = list(args)
    for place, parameter in enumerate(positional):  # x.view(2, 3), x.permute(0, 2, 1)
        rest = values[place:]
        is_last = rest and len(positional) == place + 1
        if is_last and parameter.is_list and parameter.kind == "IntType" and all(map(_is_number, rest)):
            values[place:] = [tuple(rest)] if parameter.size is None or len(rest) > 1 else rest
    if len(values) > len(positional):
        return None
    arguments = {name_of(p, schema): value for p, value in zip(positional, values, strict=False)}
    names = {name_of(p, schema): p for p in schema.parameters}
    for name, value in kwargs.items():
        name = _RENAMED_IN.get((schema.operator, name), _RENAMED.get(name, name))
        if name not in names or name in arguments:
            return None
        arguments[name] = value
    if any(name not in arguments and not p.has_default for name, p in names.items()):
        return None
    return {name: arguments[name] for name in names if name in arguments}


def _is_number(value: Any) -> bool:
    """Whether a value is an integer, or a node that may be one."""
    if isinstance(value, fx.Node):
        return not is_tensor(value)
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)


_PLAIN: dict[str, Any] = {
    "BoolType": bool,
    "FloatType": int | float | torch.SymInt | torch.SymFloat,
    "IntType": int | torch.SymInt | torch.dtype | torch.memory_format | torch.layout,
    "NumberType": int | float | complex | torch.SymInt | torch.SymFloat,
    "StringType": str,
}


def _fits(parameter: Parameter, value: Any) -> bool:
    """Whether a parameter takes a value."""
    if value is None:
        return parameter.is_optional
    if parameter.is_list and isinstance(value, list | tuple):
        return all(_fits_one(parameter.kind, v) or v is None for v in value)
    if parameter.is_list and parameter.size is None and not isinstance(value, fx.Node):
        return False
    return _fits_one(parameter.kind, value)


def _fits_one(kind: str, value: Any) -> bool:
    if isinstance(value, fx.Node):
        return kind not in ("StringType", "BoolType") and (kind == "TensorType") is is_tensor(value)
    if kind == "TensorType":
        return isinstance(value, torch.Tensor | fx.Proxy)
    return isinstance(value, _PLAIN[kind]) if kind in _PLAIN else True


def value_of(node: fx.Node) -> Any:
    return node.meta.get("val", node.meta.get("example_value"))


def is_tensor(node: fx.Node) -> bool:
    """Whether a node's value is a tensor, or a sequence of some; one without a value is taken for a tensor."""
    value = value_of(node)
    if isinstance(value, list | tuple):
        return any(isinstance(v, torch.Tensor) for v in value)
    return value is None or isinstance(value, torch.Tensor)


@functools.cache
def parameters_of(spelled: Spelling) -> dict[str, Any]:
    """The parameters of an operator as its function has them, with their defaults or `inspect.Parameter.empty`."""
    function = DISPATCHED.get(spelled.operator, spelled.operator)
    if inspect.isfunction(function):
        found = {name: p.default for name, p in signature_of(function).parameters.items()}
        first = next(iter(found))
        found = {("input" if name == first and name == "x" else name): default for name, default in found.items()}
    else:
        found = {
            name_of(p, schema): p.default if p.has_default else inspect.Parameter.empty
            for schema in aten_schemas(spelled.name)[:1]
            for p in schema.parameters
        }
    return {name: default for name, default in found.items() if name not in LEFT_OUT}


@functools.cache
def schema_parameters(name: str) -> dict[str, Parameter]:
    """The parameters of all overloads of an ATen operator by their names; the first overload that has one counts."""
    found: dict[str, Parameter] = {}
    for schema in aten_schemas(name):
        for parameter in schema.parameters:
            found.setdefault(name_of(parameter, schema), parameter)
    return found
