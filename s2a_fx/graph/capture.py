"""Turn an `nn.Module` into a `torch.fx.GraphModule` whose nodes know shape, dtype and module.

The graph

1. shares the storages of the model's weights but owns its modules and `nn.Parameter`s, so that freezing, adding and replacing
   in the graph never shows in the model it came from;
2. switches with `.train()` and `.eval()` as the model does. The model is traced in both modes and the two graphs are compared:
   a call which differs in constants alone (the `dropout_p` of an attention, say) becomes a `TrainingSwitch`; a module whose
   nodes themselves differ (a stochastic depth that returns early) stays a leaf;
3. keeps the batch symbolic: sizes that the model reads from its input stay nodes;
4. carries `node.meta["val"]` (fake tensors) and `node.meta["nn_module_stack"]` (provenance) on every node.

torch.fx is tried first. A model it cannot follow goes to `torch.export`, which bakes train mode in: a warning says so.
"""

import copy
import inspect
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import get_notrace_functions, get_notrace_modules
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from s2a_fx.errors import InputError, TraceError
from s2a_fx.graph.fake import traced_inputs
from s2a_fx.graph.flow import eliminate_dead_code
from s2a_fx.graph.metadata import add_note
from s2a_fx.graph.provenance import owner_path
from s2a_fx.graph.shapes import propagate
from s2a_fx.graph.training_switch import Difference, TrainingSwitch

_BASE_PARAMETERS = "s2a_fx.base_parameters"
_NON_PERSISTENT = "s2a_fx.non_persistent_buffers"


def trace(model: nn.Module, example_inputs: torch.Tensor | Sequence[torch.Tensor]) -> fx.GraphModule:
    """Trace `model` into a graph with shapes and provenance.

    Args:
        model: any module, its weights real, fake or on the `meta` device. A `GraphModule` made by s2a_fx keeps its graph.
        example_inputs: what `model` is called with, positionally: one tensor or a sequence of them, real, fake or meta. Only
            shapes, dtypes and devices are read.

    Returns:
        A graph module that shares the storages of `model`'s weights and owns everything else.

    Raises:
        InputError: the inputs are no tensors, lie on several devices, or are refused by the model.
        TraceError: neither torch.fx nor torch.export can follow the model; names the module and the line.
    """
    inputs = _checked_inputs(model, example_inputs)
    owned = share_weights(model)
    if isinstance(owned, fx.GraphModule) and _BASE_PARAMETERS in owned.meta:
        gm = owned
        traced = traced_inputs(gm)
        if len(inputs) != len(traced):
            raise InputError(f"the graph takes {len(traced)} inputs, got {len(inputs)}; pass as many as it was traced with.")
        if all(_same_kind(t, v) for t, v in zip(inputs, traced, strict=True)):
            return gm  # the shapes stand already
    else:
        try:
            gm = _symbolic(owned, len(inputs))
        except TraceError as refusal:
            gm = _exported(owned, inputs, refusal)
        gm.meta[_BASE_PARAMETERS] = sum(p.numel() for p in gm.parameters())
    try:
        propagate(gm, inputs)
    except Exception as error:
        shapes = ", ".join(str(tuple(t.shape)) for t in inputs)
        raise InputError(
            f"{type(model).__name__} does not take inputs of shape {shapes}: {_last_line(error)}. {_advice(error)}"
        ) from error
    return gm


def _advice(refusal: Exception) -> str:
    if "more than 1 value per channel" in str(refusal):  # a norm over the batch, of one image whose map is one position
        return "Pass a larger batch or larger images."
    return "Pass inputs of the size that the model was built for."


def _same_kind(given: torch.Tensor, traced: torch.Tensor) -> bool:
    return (given.shape, given.dtype, given.requires_grad) == (traced.shape, traced.dtype, traced.requires_grad)


def base_parameters(gm: fx.GraphModule) -> int:
    """How many parameters the model had before any pass."""
    return int(gm.meta[_BASE_PARAMETERS])


def _checked_inputs(model: nn.Module, example_inputs: torch.Tensor | Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    inputs = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else tuple(example_inputs)
    wrong = [type(t).__name__ for t in inputs if not isinstance(t, torch.Tensor)]
    if not inputs or wrong:
        raise InputError(
            f"example_inputs: got {', '.join(wrong) or 'nothing'}, wanted tensors; "
            "pass what the model is called with, for example (torch.randn(2, 3, 224, 224),)."
        )
    devices = {t.device.type for t in [*inputs, *model.parameters(), *model.buffers()]} - {"meta"}
    if len(devices) > 1:
        raise InputError(
            f"model and inputs lie on several devices: {', '.join(sorted(devices))}; move the model and its inputs to one."
        )
    return inputs


def share_weights(model: nn.Module) -> nn.Module:
    """A copy of the modules around the same storages: new `nn.Parameter`s over the old data, the same buffers."""
    memo: dict[int, Any] = {id(b): b for b in model.buffers()}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    try:
        return copy.deepcopy(model, memo)
    except RuntimeError as error:
        raise InputError(
            f"{type(model).__name__} holds tensors that cannot be copied ({_last_line(error)}). Remove what computes weights from "
            "weights, such as weight_norm, or trace the model before its first forward."
        ) from error


@dataclass
class _Divergence:
    """Where the training graph and the inference graph part."""

    leaves: set[str] = field(default_factory=set)
    switches: dict[str, tuple[Difference, ...]] = field(default_factory=dict)


def _symbolic(model: nn.Module, arity: int) -> fx.GraphModule:
    modes = [(module, module.training) for module in model.modules()]
    leaves: set[str] = set()
    while True:
        train_graph = _trace_once(model.train(), arity, leaves)
        eval_graph = _trace_once(model.eval(), arity, leaves)
        divergence = _compare(train_graph, eval_graph)
        if not divergence.leaves - leaves - {""}:
            break
        leaves |= divergence.leaves
    for module, training in modes:
        module.training = training
    train_graph._tracer_cls = BufferTracer
    gm = fx.GraphModule(model, train_graph, type(model).__name__)
    gm.meta[_NON_PERSISTENT] = tuple(
        f"{path}.{name}".lstrip(".") for path, module in model.named_modules() for name in module._non_persistent_buffers_set
    )
    leave_out_non_persistent(gm)
    gm._register_deepcopy_hook(leave_out_non_persistent)
    for name, differences in divergence.switches.items():
        _insert_switch(gm, name, differences)
    if "" in divergence.leaves:
        add_note(gm, "trace", "", "the model's own forward differs between train and eval mode: this is the graph of train mode")
    eliminate_dead_code(gm)
    gm.graph.lint()
    gm.recompile()
    return gm


def leave_out_non_persistent(gm: fx.GraphModule) -> None:
    """Leave out of the graph's state dict what the model leaves out of its own: torch 2.11 lets a graph save all buffers."""
    modules = dict(gm.named_modules())
    for path in gm.meta[_NON_PERSISTENT]:
        owner, _, name = path.rpartition(".")
        if owner in modules and name in modules[owner]._buffers:
            modules[owner]._non_persistent_buffers_set.add(name)


class BufferTracer(fx.Tracer):
    """A tracer for which reading a buffer is a node: no constant of the tracing device is baked in. Unpickling uses it too."""

    proxy_buffer_attributes = True


class _Tracer(BufferTracer):
    """Has timm's leaf registry, and a placeholder for each given input only: other arguments keep their defaults."""

    def __init__(self, arity: int, leaves: set[str]) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self.arity = arity
        self.leaves = leaves
        self.leaf_types = set(get_notrace_modules())

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            super().is_leaf_module(m, module_qualified_name)
            or module_qualified_name in self.leaves
            or type(m) in self.leaf_types
            or _is_childless_switch(m)
            or isinstance(m, nn.Linear)  # timm's thin subclass, which only spells out its autocast
            or type(m).__module__.startswith("s2a_fx.nn")
        )

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        names = _input_names(root_fn, self.arity)
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in names)]


def _is_childless_switch(module: nn.Module) -> bool:
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and "training" in code.co_names and next(module.children(), None) is None


def _input_names(forward: Callable[..., Any], arity: int) -> list[str]:
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    missing = [
        p.name for p in parameters[arity:] if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.POSITIONAL_ONLY)
    ]
    if missing:
        raise InputError(f"the model's forward also needs {', '.join(missing)}; give an example input for each.")
    if len(positional) < arity and not variadic:
        raise InputError(f"the model's forward takes {len(positional)} positional arguments, got {arity} example inputs.")
    return [positional[i] if i < len(positional) else f"input_{i}" for i in range(arity)]


def _trace_once(model: nn.Module, arity: int, leaves: set[str]) -> fx.Graph:
    tracer = _Tracer(arity, leaves)
    try:
        return tracer.trace(model)
    except InputError:
        raise
    except Exception as error:
        path = next(reversed(tracer.module_stack), "") if tracer.module_stack else ""
        raise TraceError(f"{_where(model, path, error)}: torch.fx cannot follow it ({_last_line(error)})") from error


def _where(model: nn.Module, path: str, error: BaseException) -> str:
    """The module and the source line in which tracing stopped: the innermost frame that is not torch's."""
    module = model.get_submodule(path.split("@")[0])
    place = f"{path or 'the model itself'} ({type(module).__name__})"
    torch_root = torch.__path__[0]
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(torch_root)]
    frames = [f for f in frames if f.filename != __file__]
    return f"{place}, line {frames[-1].lineno} of {frames[-1].filename}" if frames else place


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def _compare(train_graph: fx.Graph, eval_graph: fx.Graph) -> _Divergence:
    """Set the nodes which each module itself emits in train mode against those in eval mode."""
    found = _Divergence()
    twins: dict[fx.Node, fx.Node] = {}  # node of the eval graph -> its counterpart
    for owner_nodes in _paired(train_graph, eval_graph):
        twins.update({b: a for a, b in owner_nodes})
    train_parts, eval_parts = _by_owner(train_graph), _by_owner(eval_graph)
    for owner in train_parts.keys() | eval_parts.keys():
        ours, theirs = train_parts.get(owner, []), eval_parts.get(owner, [])
        if [(n.op, n.target) for n in ours] != [(n.op, n.target) for n in theirs]:
            found.leaves.add(owner)
            continue
        for a, b in zip(ours, theirs, strict=True):
            differences = _differences(a, b, twins)
            if differences is None:
                found.leaves.add(owner)
            elif differences:
                found.switches[a.name] = differences
    # A leaf inside a leaf need not be named; a switch inside a leaf is gone with it.
    found.leaves = {p for p in found.leaves if not any(p != q and _inside(p, q) for q in found.leaves)}
    return found


def _inside(path: str, outer: str) -> bool:
    return outer != "" and path.startswith(outer + ".")


def _by_owner(graph: fx.Graph) -> dict[str, list[fx.Node]]:
    parts: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op != "get_attr":  # a parameter's first reader creates the node, whichever module that is
            parts.setdefault(owner_path(node), []).append(node)
    return parts


def _paired(train_graph: fx.Graph, eval_graph: fx.Graph) -> Iterator[list[tuple[fx.Node, fx.Node]]]:
    """The nodes of either graph side by side, module by module; parameters and buffers by name."""
    train_parts, eval_parts = _by_owner(train_graph), _by_owner(eval_graph)
    for owner in train_parts.keys() & eval_parts.keys():
        yield list(zip(train_parts[owner], eval_parts[owner], strict=False))
    reads = {node.target: node for node in train_graph.nodes if node.op == "get_attr"}
    yield [(reads[n.target], n) for n in eval_graph.nodes if n.op == "get_attr" and n.target in reads]


def _differences(a: fx.Node, b: fx.Node, twins: dict[fx.Node, fx.Node]) -> tuple[Difference, ...] | None:
    """The constants in which two calls differ; None where they differ in more than plain constants."""
    if len(a.args) != len(b.args) or a.kwargs.keys() != b.kwargs.keys():
        return None
    pairs: list[tuple[int | str, Any, Any]] = [(i, x, y) for i, (x, y) in enumerate(zip(a.args, b.args, strict=True))]
    pairs += [(key, a.kwargs[key], b.kwargs[key]) for key in a.kwargs]
    found = []
    for key, x, y in pairs:
        y = fx.node.map_arg(y, lambda node: twins.get(node, node))
        if x == y and type(x) is type(y):
            continue
        if _holds_nodes(x) or _holds_nodes(y):
            return None
        found.append(Difference(key, x, y))
    if found and a.op != "call_function":
        return None
    return tuple(found)


def _holds_nodes(argument: Any) -> bool:
    return any(isinstance(leaf, fx.Node) for leaf in tree_leaves(argument))


def _insert_switch(gm: fx.GraphModule, name: str, differences: tuple[Difference, ...]) -> None:
    node = next(n for n in gm.graph.nodes if n.name == name)
    path = f"training_switches.{name}"
    switch_module = TrainingSwitch(node.target, differences)
    gm.add_submodule(path, switch_module.train(gm.get_submodule(owner_path(node)).training))
    with gm.graph.inserting_before(node):
        switch = gm.graph.call_module(path, node.args, node.kwargs)
    switch.meta = dict(node.meta)
    node.replace_all_uses_with(switch)
    gm.graph.erase_node(node)


def _exported(model: nn.Module, inputs: tuple[torch.Tensor, ...], refusal: TraceError) -> fx.GraphModule:
    """The graph of torch.export, for models with control flow that torch.fx cannot follow."""
    model.train()
    try:
        # Keyed by position: a batch that the model turns out to fix is then no error.
        dynamic = tuple({0: torch.export.Dim.AUTO} if t.ndim and t.shape[0] > 1 else None for t in inputs)
        program = torch.export.export(model, inputs, dynamic_shapes=dynamic, strict=False)
    except Exception as error:
        raise TraceError(
            f"{refusal}; and torch.export refuses it too ({_last_line(error)}). Rewrite that line without control flow on "
            "tensors, or mark its module with timm.layers.register_notrace_module so that it stays one opaque node."
        ) from error
    gm = program.module()
    assert isinstance(gm, fx.GraphModule)
    cost = (
        f"{refusal}; traced by torch.export instead: train mode and the control flow that was taken are baked in, and "
        "the result cannot be switched by .train() and .eval()"
    )
    add_note(gm, "trace", "", cost)
    warnings.warn(cost, stacklevel=4)
    return gm
