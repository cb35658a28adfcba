"""Which operator a node calls, however the model spells it: the one vocabulary of what nodes compute.

    nn.LayerNorm(8)(x)                          module
    F.layer_norm(x, (8,), w, b)                 function          one `Call`: operator F.layer_norm, operands input, weight, bias,
    torch.ops.aten.layer_norm(x, [8], w, b)     ATen overload     options normalized_shape=(8,), eps=1e-05
    x + y, x.add_(y), torch.add(x, y)           operator.*, tensor method: torch.add, `in_place` says of which operand

Operators and their parameters have the names that `torch` and `torch.nn.functional` give them. ATen's schemas tell what a call
binds, writes to, views and draws; `spellings` says how a function or method is written and bound.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import timm.layers
import timm.layers.activations
import torch
import torch.nn.functional as F
from timm.layers.drop import drop_path
from torch import fx, nn

from s2a_fx.errors import InputError
from s2a_fx.graph import torch_internals
from s2a_fx.graph.regions import MODEL_REGIONS
from s2a_fx.graph.spellings import (
    ATTRIBUTES,
    DISPATCHED,
    DRAWING,
    LEFT_OUT,
    PROBABILITIES,
    Bound,
    Function,
    Spelling,
    is_tensor,
    name_of,
    parameters_of,
    schema_parameters,
    schemas_of,
    spelling,
    value_of,
)
from s2a_fx.graph.torch_internals import BatchNorm, Parameter, aten_schemas, schema_of
from s2a_fx.graph.training_switch import TrainingSwitch

Operand = fx.Node | str | tuple[Any, ...]
"""A node; the path of a module's own parameter or buffer; or a sequence of nodes and None, as `torch.cat` takes."""


@dataclass(frozen=True)
class Call:
    """A call of one operator.

    Attributes:
        node: the node that calls it.
        operator: the function of `torch.nn.functional`, else of `torch`, else of `torch.Tensor`. For subscripts `operator.getitem`
            and `operator.setitem`, for a module that does nothing `nn.Identity`; timm's `drop_path` and `quick_gelu`.
        operands: the tensors it reads, by the parameters' names; those that are None are left out.
        options: all other arguments in train mode, defaults included. Sizes are tuples; nodes whose values are no tensors have
            their values.
        eval_options: the same in eval mode.
        in_place: the name of the operand that it writes to; None if it writes to none. A batch norm's own statistics do not count.
        draws: whether it draws random numbers in train mode; a dropout of 0 does not.
        is_view: whether it only shows its operand's elements, through which gradients flow; a copy of them counts, too (reshape).
    """

    node: fx.Node
    operator: Function | type[nn.Module]
    operands: Mapping[str, Operand]
    options: Mapping[str, Any]
    eval_options: Mapping[str, Any]
    in_place: str | None
    draws: bool
    is_view: bool

    @property
    def input(self) -> fx.Node:
        """The first operand, of a call that has one."""
        first = next(iter(self.operands.values()))
        found = first[0] if isinstance(first, tuple) else first
        assert isinstance(found, fx.Node)
        return found

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The operands that are nodes, in the order of the parameters."""
        return tuple(operand for operand in self.operands.values() if isinstance(operand, fx.Node))

    def path_of(self, name: str) -> str | None:
        """Where the model keeps an operand; None if there is no such operand, or it is computed."""
        operand = self.operands.get(name)
        if isinstance(operand, fx.Node):
            return str(operand.target) if operand.op == "get_attr" else None
        return operand if isinstance(operand, str) else None


_MODULES: dict[type[nn.Module], Any] = {
    nn.Identity: nn.Identity,
    nn.Linear: F.linear,
    timm.layers.Linear: F.linear,
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
    nn.ConvTranspose1d: F.conv_transpose1d,
    nn.ConvTranspose2d: F.conv_transpose2d,
    nn.ConvTranspose3d: F.conv_transpose3d,
    nn.BatchNorm1d: F.batch_norm,
    nn.BatchNorm2d: F.batch_norm,
    nn.BatchNorm3d: F.batch_norm,
    BatchNorm: F.batch_norm,  # of which others than these derive
    nn.LayerNorm: F.layer_norm,
    nn.RMSNorm: F.rms_norm,
    nn.GroupNorm: F.group_norm,
    nn.InstanceNorm1d: F.instance_norm,
    nn.InstanceNorm2d: F.instance_norm,
    nn.InstanceNorm3d: F.instance_norm,
    nn.LocalResponseNorm: F.local_response_norm,
    nn.Embedding: F.embedding,
    nn.MaxPool1d: F.max_pool1d,
    nn.MaxPool2d: F.max_pool2d,
    nn.MaxPool3d: F.max_pool3d,
    nn.AvgPool1d: F.avg_pool1d,
    nn.AvgPool2d: F.avg_pool2d,
    nn.AvgPool3d: F.avg_pool3d,
    nn.AdaptiveAvgPool1d: F.adaptive_avg_pool1d,
    nn.AdaptiveAvgPool2d: F.adaptive_avg_pool2d,
    nn.AdaptiveAvgPool3d: F.adaptive_avg_pool3d,
    nn.AdaptiveMaxPool1d: F.adaptive_max_pool1d,
    nn.AdaptiveMaxPool2d: F.adaptive_max_pool2d,
    nn.AdaptiveMaxPool3d: F.adaptive_max_pool3d,
    nn.Dropout: F.dropout,
    nn.Dropout1d: F.dropout1d,
    nn.Dropout2d: F.dropout2d,
    nn.Dropout3d: F.dropout3d,
    nn.AlphaDropout: F.alpha_dropout,
    nn.FeatureAlphaDropout: F.feature_alpha_dropout,
    timm.layers.DropPath: drop_path,
    nn.GELU: F.gelu,
    timm.layers.GELU: F.gelu,
    timm.layers.GELUTanh: F.gelu,
    timm.layers.QuickGELU: timm.layers.activations.quick_gelu,
    nn.SiLU: F.silu,
    timm.layers.Swish: F.silu,
    nn.Mish: F.mish,
    timm.layers.Mish: F.mish,
    nn.ReLU: F.relu,
    nn.ReLU6: F.relu6,
    nn.LeakyReLU: F.leaky_relu,
    nn.RReLU: F.rrelu,
    nn.PReLU: F.prelu,
    timm.layers.PReLU: F.prelu,
    nn.ELU: F.elu,
    nn.CELU: F.celu,
    nn.SELU: F.selu,
    nn.GLU: F.glu,
    nn.Sigmoid: torch.sigmoid,
    timm.layers.Sigmoid: torch.sigmoid,
    nn.Tanh: torch.tanh,
    timm.layers.Tanh: torch.tanh,
    nn.LogSigmoid: F.logsigmoid,
    nn.Softplus: F.softplus,
    nn.Softsign: F.softsign,
    nn.Softshrink: F.softshrink,
    nn.Hardshrink: F.hardshrink,
    nn.Tanhshrink: F.tanhshrink,
    nn.Threshold: F.threshold,
    nn.Hardtanh: F.hardtanh,
    nn.Hardswish: F.hardswish,
    timm.layers.HardSwish: F.hardswish,
    nn.Hardsigmoid: F.hardsigmoid,
    timm.layers.activations.HardSigmoid: F.hardsigmoid,
    nn.Softmax: F.softmax,
    nn.LogSoftmax: F.log_softmax,
    nn.Softmin: F.softmin,
    nn.Flatten: torch.flatten,
    nn.Unflatten: torch.unflatten,
    nn.PixelShuffle: F.pixel_shuffle,
    nn.PixelUnshuffle: F.pixel_unshuffle,
    nn.ChannelShuffle: F.channel_shuffle,
    nn.Upsample: F.interpolate,
}
"""Module -> the operator that it calls with its tensors and attributes of the parameters' names. Subclasses may do more."""

_MODULE_OPTIONS: dict[type[nn.Module], dict[str, str]] = {nn.Unflatten: {"sizes": "unflattened_size"}}
"""Options that stand under another name on the module."""

_MODULE_CONSTANTS: dict[type[nn.Module], dict[str, Any]] = {timm.layers.GELUTanh: {"approximate": "tanh"}}
"""Options that a module always has."""

_CHANGES_GRADIENTS = ("detach", "detach_", "real", "imag", "conj", torch_internals.CONJUGATE, "lift_fresh")
"""Views through which gradients do not flow as they do through others."""


def call_of(gm: nn.Module, node: fx.Node) -> Call | None:
    """The operator that a node calls.

    Args:
        gm: the graph module, or the module whose submodules its graph calls.
        node: any node; shapes on it (`meta["val"]`) tell tensors from numbers where there are some.

    Returns:
        None for placeholders, attributes and outputs; for what calls no operator of torch's, a module of another class say; and
        for arithmetic on sizes.
    """
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        if isinstance(module, TrainingSwitch):
            return _call_of_switch(node, module)
        return _call_of_module(node, module)
    if node.op in ("call_function", "call_method"):
        return _call(node, node.target, node.args, node.kwargs, None)
    return None


def find_calls(gm: fx.GraphModule, function: Function | type[nn.Module]) -> tuple[Call, ...]:
    """The calls of an operator in a graph, in order, however the model spells it: a layer, a function, a method, an ATen operator.

        for call in find_calls(gm, torch.nn.functional.layer_norm):
            call.node, call.input, call.path_of("weight"), call.options["eps"]

    Args:
        gm: what `trace` or `transform` returned, or what `Pass.rewrite` gets. What the model runs under `torch.no_grad()`,
            `torch.autocast` or its own checkpoints, in one mode alone, or with optional arguments, is searched, too; modules that
            passes put in the place of operators are not.
        function: any spelling of the operator: `F.layer_norm`, `nn.LayerNorm`, `torch.ops.aten.layer_norm.default`.

    Raises:
        InputError: `function` is no operator of torch's, and no layer that is one.
    """
    if not isinstance(gm, fx.GraphModule):
        raise InputError(f"find_calls: got a {type(gm).__name__}, wanted a graph module; pass what s2a_fx.trace returns.")
    wanted = canonical(function)
    if wanted is None:
        raise InputError(
            f"find_calls: {getattr(function, '__name__', function)!r} is no one operator of torch's; give a function of torch or "
            "torch.nn.functional, a method of torch.Tensor, an operator of torch.ops.aten, or a layer that calls one of these, "
            "torch.nn.LayerNorm say. Containers and models call many: look for what they call."
        )
    return tuple(call for call in _calls(gm) if call.operator is wanted)


def _calls(gm: fx.GraphModule) -> Iterator[Call]:
    for node in gm.graph.nodes:
        module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, MODEL_REGIONS):
            for body in module.bodies():
                yield from _calls(body)
        elif (call := call_of(gm, node)) is not None:
            yield call


def canonical(function: Any) -> Function | type[nn.Module] | None:
    """The operator of a spelling; None for what is no operator of torch's."""
    if isinstance(function, type):
        return _MODULES.get(function)
    spelled = spelling(function) if callable(function) and not isinstance(function, nn.Module) else None
    return None if spelled is None else spelled.operator


def operator_of(gm: nn.Module, node: fx.Node) -> Function | type[nn.Module] | None:
    """The operator that a node calls, or that its module does more than call: of a subclass of `nn.Conv2d`, F.conv2d."""
    call = call_of(gm, node)
    if call is not None or node.op != "call_module":
        return None if call is None else call.operator
    kinds = type(gm.get_submodule(str(node.target))).__mro__
    return next((_MODULES[kind] for kind in kinds if kind in _MODULES), None)


def draws(gm: nn.Module, node: fx.Node) -> bool | None:
    """Whether a node draws random numbers in train mode; None where it calls no operator of torch's."""
    call = call_of(gm, node)
    if call is not None:
        return call.draws
    if node.op not in ("call_function", "call_method"):
        return None
    target: Any = node.target
    if isinstance(target, torch_internals.Overload):
        return schema_of(target).draws
    spelled = spelling(target)  # of a call that could not be bound, or whose value is no tensor
    return None if spelled is None else spelled.operator in DRAWING or any(s.draws for s in aten_schemas(spelled.name))


def written_operand(target: Function | str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """The name of the operand that a call of a function, or of a method by its name, writes to; None if it writes to none."""
    if isinstance(target, torch_internals.Overload):
        schema = schema_of(target)
        return next((name_of(p, schema) for p in schema.parameters if p.is_written), None)
    if kwargs.get("out") is not None:
        return "out"
    if kwargs.get("inplace") or any(p.is_written for schema in schemas_of(target)[:1] for p in schema.parameters[:1]):
        return "input"
    spelled = spelling(target)
    bound = None if spelled is None else spelled.bind(tuple(args), dict(kwargs))
    return None if bound is None else bound.in_place


def written_value(node: fx.Node) -> Any:
    """What a call of a function or method writes to: a node, or a sequence of nodes; None if it writes to nothing."""
    target: Any = node.target
    name = written_operand(target, node.args, node.kwargs) if node.op in ("call_function", "call_method") else None
    if name is None:
        return None
    spelled = spelling(target)
    bound = None if spelled is None else spelled.bind(node.args, dict(node.kwargs))
    given = {**node.kwargs, **({} if bound is None else bound.arguments)}
    value = given.get(name, node.args[0] if node.args else None)
    return None if isinstance(value, fx.Node) and not is_tensor(value) else value  # a number, which nothing writes to


def is_in_place(module: nn.Module) -> bool:
    """Whether a layer writes to what it reads: torch's layers have an option of this name, and models' own follow them."""
    return bool(getattr(module, "inplace", False))


def writes(gm: nn.Module, node: fx.Node) -> bool:
    """Whether a node writes to an operand."""
    if node.op == "call_module":
        return is_in_place(gm.get_submodule(str(node.target)))
    return written_value(node) is not None


def _call(
    node: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], evaluation: tuple[tuple[Any, ...], Any] | None
) -> Call | None:
    """The call of a function or method; `evaluation`: its arguments in eval mode, where they differ."""
    if target is getattr and isinstance(args[1], str) and args[1] in ATTRIBUTES:
        target, args = ATTRIBUTES[args[1]], args[:1]
    spelled = spelling(target)
    if spelled is None or not is_tensor(node):
        return None
    bound = spelled.bind(*_with_values(args, kwargs))
    other = bound if evaluation is None else spelled.bind(*_with_values(*evaluation))
    if bound is None or other is None:
        return None
    operands = {name: v for name, v in bound.arguments.items() if _is_operand(spelled.name, name, v)}
    options, eval_options = (_options(spelled, b, operands) for b in (bound, other))
    return Call(
        node, spelled.operator, {name: _as_operand(v) for name, v in operands.items()}, options, eval_options,
        bound.in_place, _draws(spelled, options), _is_view(spelled.name, options, node, operands),
    )  # fmt: skip


def _call_of_switch(node: fx.Node, switch: TrainingSwitch) -> Call | None:
    def arguments(mode: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = list(node.args), dict(node.kwargs)
        for difference in switch.differences:
            key, value = difference.argument, getattr(difference, mode)
            if isinstance(key, int):
                args[key] = value
            else:
                kwargs[key] = value
        return tuple(args), kwargs

    return _call(node, switch.function, *arguments("train"), evaluation=arguments("eval"))


def _call_of_module(node: fx.Node, module: nn.Module) -> Call | None:
    kind: Any = type(module)
    function = _MODULES.get(kind)
    if function is None or len(node.args) + len(node.kwargs) != 1 or getattr(module, "padding_mode", "zeros") != "zeros":
        return None
    x: Any = next(iter((*node.args, *node.kwargs.values())))
    if function is nn.Identity:
        return Call(node, nn.Identity, {"input": x}, {}, {}, None, False, True)
    spelled = spelling(function)
    assert spelled is not None
    arguments = {"input": x, **_MODULE_CONSTANTS.get(kind, {})}
    names = _MODULE_OPTIONS.get(kind, {})
    for name in parameters_of(spelled):
        attribute = names.get(name, name)
        if name not in arguments and name != "training" and hasattr(module, attribute):
            value = getattr(module, attribute)
            arguments[name] = f"{node.target}.{attribute}" if isinstance(value, torch.Tensor) else value
    in_place = "input" if is_in_place(module) else None
    operands = {name: v for name, v in arguments.items() if _is_operand(spelled.name, name, v) or _is_path(module, name, v)}
    modes = [Bound({**arguments, **_training(spelled, arguments, training)}, None, None) for training in (True, False)]
    options, eval_options = (_options(spelled, bound, operands) for bound in modes)
    is_view = _is_view(spelled.name, options, node, operands)
    return Call(node, function, operands, options, eval_options, in_place, _draws(spelled, options), is_view)


def _is_path(module: nn.Module, name: str, value: Any) -> bool:
    return isinstance(value, str) and isinstance(getattr(module, name, None), torch.Tensor)


def _training(spelled: Spelling, arguments: dict[str, Any], training: bool) -> dict[str, bool]:
    """What a module hands over as `training`: a norm without running statistics goes by the input's own in eval mode, too."""
    name = "use_input_stats" if spelled.operator is F.instance_norm else "training"
    if name not in parameters_of(spelled):
        return {}
    by_input = "running_mean" in parameters_of(spelled) and arguments.get("running_mean") is None
    return {name: training or by_input}


def _options(spelled: Spelling, bound: Bound, operands: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments but tensors, defaults filled in, as one spelling has them as another."""
    known = schema_parameters(spelled.name)
    defaults = parameters_of(spelled)
    if bound.schema is not None and not inspect.isfunction(DISPATCHED.get(spelled.operator, spelled.operator)):
        defaults = {name_of(p, bound.schema): p.default for p in bound.schema.parameters if p.has_default}
    options = {}
    for name, value in {**defaults, **bound.arguments}.items():
        parameter = known.get(name)
        is_absent = value is inspect.Parameter.empty or (value is None and parameter is not None and parameter.kind == "TensorType")
        if not (is_absent or name in operands or name in LEFT_OUT):
            options[name] = _plain(value, parameter)
    if "kernel_size" in options and options.get("stride") in (None, ()):  # of a pooling
        options["stride"] = options["kernel_size"]
    return options


def _plain(value: Any, parameter: Parameter | None) -> Any:
    """A size as a tuple, and one number for all dimensions as so many."""
    if isinstance(value, list | tuple):
        return tuple(_plain(v, None) for v in value)
    if parameter is not None and parameter.is_list and parameter.kind == "IntType" and type(value) is int:
        return (value,) * (parameter.size or 1)
    return value


def _with_values(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with the values of those nodes that are no tensors."""

    def resolve(node: fx.Node) -> Any:
        return node if is_tensor(node) else value_of(node)

    return fx.node.map_arg(args, resolve), dict(fx.node.map_arg(dict(kwargs), resolve))  # type: ignore[call-overload, arg-type]


def _is_operand(operator_name: str, name: str, value: Any) -> bool:
    if operator_name in ("getitem", "setitem") and name == "index":
        return False
    if isinstance(value, list | tuple):
        return any(isinstance(v, fx.Node) for v in value)
    return isinstance(value, fx.Node)


def _as_operand(value: Any) -> Operand:
    return tuple(value) if isinstance(value, list | tuple) else value


def _draws(spelled: Spelling, options: Mapping[str, Any]) -> bool:
    """Whether a call draws random numbers in train mode, by ATen's tags; a probability that the graph computes may be any."""
    if not options.get("training", True):
        return False
    if spelled.operator in PROBABILITIES:
        return bool(options.get(PROBABILITIES[spelled.operator], True))
    return spelled.operator in DRAWING or any(schema.draws for schema in aten_schemas(spelled.name))


def _is_view(name: str, options: Mapping[str, Any], node: fx.Node, operands: Mapping[str, Any]) -> bool:
    """Whether an operator returns its operand's elements, by ATen's aliases; of a cast, only one that changes no dtype."""
    if name == "getitem":
        return all(i is None or i is Ellipsis or isinstance(i, int | slice | torch.SymInt) for i in _indices(options["index"]))
    if name in _CHANGES_GRADIENTS or not any(p.is_shown and not p.is_written for s in aten_schemas(name) for p in s.parameters[:1]):
        return False
    source, made = next(iter(operands.values())), value_of(node)
    shown = value_of(source) if isinstance(source, fx.Node) else None
    return not (isinstance(made, torch.Tensor) and isinstance(shown, torch.Tensor)) or made.dtype == shown.dtype


def _indices(index: Any) -> Iterator[Any]:
    yield from index if isinstance(index, tuple) else (index,)
