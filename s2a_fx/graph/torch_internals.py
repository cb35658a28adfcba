"""Every name of torch that torch does not promise to keep, in one place.

Each has what it is used for. All were tried on torch 2.11 and 2.14.
"""

import builtins
import collections
import contextlib
import functools
import inspect
import itertools
import linecache
import logging
import re
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any, Literal, TypeAlias

import torch
import torch.utils.checkpoint
from torch import fx, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, in_kernel_invocation_manager
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.autograd.graph import _engine_run_backward
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import SequenceKey as SequenceKey
from torch.utils._pytree import TreeSpec as TreeSpec
from torch.utils._pytree import tree_any as tree_any
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_flatten_with_path as tree_flatten_with_path
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map
from torch.utils._pytree import tree_map_only as tree_map_only
from torch.utils._pytree import tree_unflatten as tree_unflatten

from s2a_fx.graph.model_code import is_torch_file

# Capture: what the model does around its calls.

CHECKPOINT_CODE: CodeType = inspect.unwrap(
    getattr(torch.utils.checkpoint, "_checkpoint_impl", torch.utils.checkpoint.checkpoint)
).__code__
"""The code that runs a checkpointed function: a capture looks for it on the stack."""

_CHECKPOINT_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(inspect.unwrap(torch.utils.checkpoint.checkpoint)).parameters.items()
    if parameter.default is not parameter.empty
}


def checkpoint_options(frame_locals: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The keyword arguments of a call of `checkpoint` from the variables of its frame: those that are not the defaults."""
    values = {**frame_locals, "preserve_rng_state": frame_locals["preserve"]}
    options = {name: values[name] for name in _CHECKPOINT_DEFAULTS if name in values and name != "function"}
    changed = {name: value for name, value in options.items() if value is not _CHECKPOINT_DEFAULTS[name]}
    return tuple({**changed, "use_reentrant": bool(options["use_reentrant"])}.items())


def autocast_options(context: torch.autocast) -> tuple[tuple[str, Any], ...]:
    """The arguments of `torch.autocast` that make another context like this one."""
    return (
        ("device_type", context.device),
        ("dtype", context.fast_dtype),
        ("enabled", context._enabled),
        ("cache_enabled", context._cache_enabled),
    )


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Leave every autocast that the caller is in, on the CPU and on CUDA."""
    devices = ("cpu", "cuda")
    before = [torch.is_autocast_enabled(device) for device in devices]
    for device in devices:
        torch.set_autocast_enabled(device, False)
    try:
        yield
    finally:
        for device, enabled in zip(devices, before, strict=True):
            torch.set_autocast_enabled(device, enabled)


# Modules: their hooks.


def forward_pre_hooks(module: nn.Module) -> list[tuple[Callable[..., Any], bool]]:
    """The forward pre-hooks of a module, each with whether it takes keyword arguments."""
    return [(hook, ident in module._forward_pre_hooks_with_kwargs) for ident, hook in module._forward_pre_hooks.items()]


def forward_hooks(module: nn.Module) -> list[tuple[Callable[..., Any], bool]]:
    """The forward hooks of a module, each with whether it takes keyword arguments."""
    return [(hook, ident in module._forward_hooks_with_kwargs) for ident, hook in module._forward_hooks.items()]


def has_hooks(module: nn.Module) -> bool:
    """Whether anything is to happen when a module runs, forward or backward."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or has_backward_hooks(module)


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether a module has backward hooks or backward pre-hooks."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


def without_compiler(model: Any) -> Any:
    """The module inside one that `torch.compile` returned; anything else as it is."""
    dynamo = sys.modules.get("torch._dynamo")  # without it nothing was compiled
    while dynamo is not None and isinstance(model, dynamo.OptimizedModule):
        model = model._orig_mod
    return model


def has_gradient_hooks(tensor: torch.Tensor) -> bool:
    """Whether anything is to happen with the gradient of a tensor."""
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)


def keep_call(module: nn.Module, kept: bool = True) -> None:
    """Say whether a module does more than compute a value: torch.fx then keeps its call though nobody reads the value."""
    module._is_impure = kept  # type: ignore[assignment]


def acts(module: nn.Module) -> bool:
    """Whether a module says that it does more than compute a value."""
    return bool(getattr(module, "_is_impure", False))


def normalized_weights(model: nn.Module) -> list[torch.Tensor]:
    """The plain attributes that hooks of `weight_norm`, `spectral_norm` and pruning compute of parameters before each forward."""
    found = []
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm | SpectralNorm | BasePruningMethod):
                name = hook._tensor_name if isinstance(hook, BasePruningMethod) else hook.name
                found += [value for value in [vars(module).get(name)] if isinstance(value, torch.Tensor)]
    return found


def changes_with_each_run(module: nn.Module) -> bool:
    """Whether a module's weight is another one each time that it runs: a spectral norm goes on with its power iteration."""
    iterates = any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values())
    return iterates or isinstance(module, torch.nn.utils.parametrizations._SpectralNorm)


def remove_hooks(module: nn.Module) -> None:
    """Remove all hooks of a module, forward and backward."""
    for hooks in (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    ):
        hooks.clear()


# Tensors: identity, versions, and values that fake ones do not have.


def make_fake(
    mode: FakeTensorMode,
    shape: tuple[int, ...],
    stride: tuple[int, ...] | None,
    dtype: torch.dtype,
    requires_grad: bool,
    is_parameter: bool,
) -> torch.Tensor:
    """A fake CPU tensor of `mode`, contiguous without a stride: what `torch.empty` makes under the mode, 15 times as fast."""
    if stride is None:
        meta = torch.empty(shape, dtype=dtype, device="meta", requires_grad=requires_grad)
    else:
        meta = torch.empty_strided(shape, stride, dtype=dtype, device="meta", requires_grad=requires_grad)
    fake: torch.Tensor = FakeTensor(mode, meta, FAKE_DEVICE)
    if is_parameter:
        fake._is_param = True  # type: ignore[attr-defined]
    return fake


def shadow_of(fake: torch.Tensor) -> torch.Tensor:
    """A fake tensor in the same storage as another, outside of autograd: `fake.detach()` without a dispatch that modes see.

    A tensor that is not fake is a constant, and returned as it is.
    """
    return _view_of_fake(torch.Tensor.detach, fake) if isinstance(fake, FakeTensor) else fake


def run_on_fake(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `func(*args, **kwargs)` returns, sooner where it is a view of a strided fake tensor, as most calls of a transformer are.

    A fake tensor looks its result up in a cache keyed by the metadata of all operands, which takes longer than the kernel that
    computes shape and strides. It decomposes `_unsafe_view`, which does what `view` does.
    """
    func = torch.ops.aten.view.default if func is torch.ops.aten._unsafe_view.default else func
    if func in VIEWS and not kwargs and isinstance(args[0], FakeTensor) and args[0].constant is None:
        return _view_of_fake(func, *args)
    return func(*args, **kwargs)


def _view_of_fake(view: Callable[..., Any], fake: FakeTensor, *arguments: Any) -> Any:
    """A view, or a list of views, of a fake tensor whose value is not known (`constant`)."""
    with in_kernel_invocation_manager(fake.fake_mode):
        meta = view(fake, *arguments)
    if isinstance(meta, torch.Tensor):
        return FakeTensor(fake.fake_mode, meta, fake.fake_device)
    return [FakeTensor(fake.fake_mode, one, fake.fake_device) for one in meta]


VIEWS = frozenset(
    {
        torch.ops.aten.alias.default,
        torch.ops.aten.detach.default,
        torch.ops.aten.expand.default,
        torch.ops.aten.permute.default,
        torch.ops.aten.select.int,
        torch.ops.aten.slice.Tensor,
        torch.ops.aten.split.Tensor,
        torch.ops.aten.t.default,
        torch.ops.aten.transpose.int,
        torch.ops.aten.unbind.int,
        torch.ops.aten.unsqueeze.default,
        torch.ops.aten.view.default,
    }
)


FAKE_DEVICE = torch.device("cpu")
"""The device that fake tensors say they are on, whatever the model is on."""

ASKS_DEVICE = torch.ops.prim.device.default
"""What autograd asks of each result, in two of three calls that a mode sees; `tensor.device` answers at once."""

READS_VALUE = (DataDependentOutputException, DynamicOutputShapeException)
"""Raised where a fake tensor is asked for its value, or for a shape that depends on it."""


def storage_key(tensor: torch.Tensor) -> int:
    """A number that is the same for tensors which share a storage, for as long as it lives."""
    return tensor.untyped_storage()._cdata


def key_of_storage(storage: torch.UntypedStorage) -> int:
    """`storage_key` of the tensors in a storage."""
    return storage._cdata


def is_view(tensor: torch.Tensor) -> bool:
    """Whether autograd knows a tensor as a view of another."""
    return tensor._base is not None


def local_part(tensor: Any) -> torch.Tensor:
    """This process's part of a DTensor, outside of autograd."""
    return tensor._local_tensor  # type: ignore[no-any-return]


def version_of(tensor: torch.Tensor) -> int:
    """How often a tensor was written to in place."""
    return tensor._version


# Dynamo: the graph of a whole forward.


@dataclass(frozen=True)
class DynamoGraph:
    """What Dynamo makes of a forward.

    Attributes:
        graph_module: its placeholders are the `arguments`.
        arguments: parameters, buffers, inputs and sizes that the graph was captured with.
        result: what the forward returns for args and kwargs, a `Marker` for each tensor that the graph returns.
        self_name: the name of the model in its own forward.
        doubtful_sizes: batch sizes for which the model may do something else: it branches on them.
    """

    graph_module: fx.GraphModule
    arguments: Sequence[Any]
    result: Callable[[Sequence[Any], dict[str, Any]], Any]
    self_name: str
    doubtful_sizes: tuple[int, ...]


class Marker:
    """Stands for the tensor that a graph returns at an index; no dataclass, which would be a structure of its own."""

    def __init__(self, index: int) -> None:
        self.index = index


def dynamo_graph(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    leaves: Sequence[torch.Tensor],
    run_leaf: Callable[..., Any],
    answers: "CompilerAnswers",
) -> DynamoGraph:
    """Capture the forward of `model`; the first dimension of each of `leaves` stays symbolic where the model lets it.

    Args:
        run_leaf: a function that stays one node wherever the forward calls it.
        answers: what a model that asks `torch.compiler.is_compiling()` is told.

    Dynamo serves `torch.compile`, too, and keeps caches and statistics for the process. One capture runs at a time, while nothing
    is compiled, and all of that is as before when it ends.
    """
    from torch._dynamo.convert_frame import compile_lock, fullgraph_capture

    torch._dynamo.allow_in_graph(run_leaf)
    for leaf in leaves:
        if leaf.ndim and leaf.shape[0] > 1:
            torch._dynamo.maybe_mark_dynamic(leaf, 0)
    with compile_lock, _own_dynamo_state(), answers.given():
        found = fullgraph_capture(model, tuple(args), kwargs)
        if found.backend_input is None:
            raise _NoGraph("it computes nothing")
        sizes: Any = found.backend_input.fake_mode.shape_env
        doubtful = _sizes_at_bounds(sizes)
        sizes.tracked_fakes.clear()  # a cycle through C++, which is never freed
        code = _CodeAroundGraph(model, found)
        code(args, kwargs)
        return DynamoGraph(found.backend_input.graph_module, code.arguments, code, code.self_name, doubtful)


def _sizes_at_bounds(sizes: Any) -> tuple[int, ...]:
    """For each condition on a size that a capture took for granted, a size of 2 or more that does not meet it."""
    found = set()
    for condition in (guard.expr for guard in sizes.guards):
        symbols = condition.free_symbols
        bounds = {int(number) + step for number in condition.atoms() if number.is_Integer for step in (-1, 0, 1)}
        if len(symbols) == 1:
            missed = (n for n in sorted(bounds) if n >= 2 and condition.subs(dict.fromkeys(symbols, n)) == False)  # noqa: E712
            found |= set(itertools.islice(missed, 1))
    return tuple(sorted(found))


Frames: TypeAlias = tuple[tuple[str, str], ...]
"""A stack of the model's code, outermost first: the file and the function."""


class CompilerAnswers:
    """What Dynamo is to answer when a forward asks whether it is compiled: no, but around the places where it could not go on.

    Nothing is exported. A forward in which Dynamo stopped may have asked just before, to take a way that a compiler can follow.
    It asks elsewhere, too, where the two ways compute different things, and there the capture takes the way that Python takes.
    """

    def __init__(self) -> None:
        self._yes: set[Frames] = set()  # whoever asks in a stack that begins so is told yes
        self._refused: set[Frames] = set()  # the stacks of those who were told no

    def say_compiling_around(self, refusal: Exception) -> bool:
        """Say yes, from now on, to those who ask nearest to where Dynamo stopped; returns whether anybody is left to tell."""
        stopped = tuple((frame.filename, frame.name) for frame in dynamo_refusal(refusal)[1])
        if not self._refused:
            return False
        depths = range(len(stopped), -1, -1)
        self._yes.add(next(stopped[:n] for n in depths if any(asking[:n] == stopped[:n] for asking in self._refused)))
        self._refused.clear()
        return True

    @contextlib.contextmanager
    def given(self) -> Iterator[None]:
        """Give these answers in the captures inside."""
        from torch._dynamo.variables.torch import TorchInGraphFunctionVariable

        def answer(_: Any, translator: Any, *args: Any, **kwargs: Any) -> Any:
            return torch._dynamo.variables.ConstantVariable.create(self._is_compiling(_frames(translator)))

        def deny(*args: Any, **kwargs: Any) -> Any:
            return torch._dynamo.variables.ConstantVariable.create(False)

        handlers: Any = TorchInGraphFunctionVariable._get_handlers()
        own = {
            torch.compiler.is_compiling: answer,
            torch.compiler.is_dynamo_compiling: answer,
            torch.compiler.is_exporting: deny,  # torch 2.11 says True in every capture
            torch.cuda.is_current_stream_capturing: deny,  # torch 2.11 would ask the GPU
        }
        before = {**handlers}
        handlers.update(own)
        try:
            yield
        finally:
            handlers.clear()
            handlers.update(before)

    def _is_compiling(self, asking: Frames) -> bool:
        if any(asking[: len(place)] == place for place in self._yes):
            return True
        self._refused.add(asking)
        return False


def _frames(translator: Any) -> Frames:
    """The stack of the model's code in which Dynamo is."""
    found = []
    while translator is not None:
        found.append((translator.f_code.co_filename, translator.f_code.co_name))
        translator = translator.parent
    return tuple(frame for frame in reversed(found) if not is_torch_file(frame[0]))


class _NoGraph(Exception):
    """Dynamo found nothing to compute."""


_DYNAMO_OPTIONS = {
    "replay_side_effects": False,
    "side_effect_replay_policy": "silent",
    "automatic_dynamic_shapes": False,  # each capture stands alone: no number changes between two
    "assume_static_by_default": True,
    "specialize_int": True,
    "capture_scalar_outputs": False,
    "capture_dynamic_output_shape_ops": False,
    "allow_rnn": True,
}


@contextlib.contextmanager
def _own_dynamo_state() -> Iterator[None]:
    """Run Dynamo with options of its own, and leave what it keeps for the process as it was."""
    from torch._dynamo import pgo, trace_rules, utils

    is_allowed, create_cleanup = trace_rules.is_callable_allowed, utils.CleanupHook.create
    with contextlib.ExitStack() as restored:

        def stays_one_node(obj: object) -> bool:
            return is_allowed(obj) or (inspect.isclass(obj) and issubclass(obj, torch.autograd.Function))

        def create_and_note(*args: Any, **kwargs: Any) -> Any:  # it removes a name from the globals of the model's file
            return restored.callback(create_cleanup(*args, **kwargs))

        restored.callback(_forget_sizes)
        _replace(restored, trace_rules, "is_callable_allowed", stays_one_node)
        _replace(restored, utils.CleanupHook, "create", create_and_note)
        _replace(restored, pgo, "_CODE_STATE", collections.defaultdict(pgo.CodeState))
        _keep_statistics(restored)
        restored.enter_context(torch._dynamo.config.patch(_DYNAMO_OPTIONS))
        restored.enter_context(utils.get_metrics_context())
        restored.enter_context(_without_source())
        yield


def _replace(restored: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    """Replace an attribute of a module or class until `restored` is closed."""
    restored.callback(setattr, owner, name, vars(owner)[name])
    setattr(owner, name, value)


def _forget_sizes() -> None:
    """Clear caches that would keep the sizes of a capture, and all its fake tensors."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    for method in vars(ShapeEnv).values():
        if hasattr(method, "cache_clear"):
            method.cache_clear()


def _keep_statistics(restored: contextlib.ExitStack) -> None:
    """Leave what Dynamo counts for the process as it is, once `restored` is closed."""
    from torch._dynamo import utils

    counters = {name: counter.copy() for name, counter in utils.counters.items()}
    times = {name: len(values) for name, values in utils.compilation_time_metrics.items()}

    def restore() -> None:
        utils.counters.clear()
        utils.counters.update(counters)
        for name, values in list(utils.compilation_time_metrics.items()):
            del values[times.get(name, 0) :]

    restored.callback(restore)


class _CodeAroundGraph:
    """The code that Dynamo makes of a forward, around the call of the graph.

    Attributes:
        arguments: what it called the graph with.
    """

    def __init__(self, model: nn.Module, found: Any) -> None:
        function, owner = torch._dynamo.convert_frame.get_traced_fn(model)
        self.owner = () if owner is None else (owner,)
        self.self_name = "" if owner is None else function.__code__.co_varnames[0]
        self.markers = tuple(map(Marker, range(len(found.backend_input.graph_module.graph.output_node().args[0]))))
        names = {**vars(builtins), **found.graph_capture_output.f_globals}
        self.run = torch._dynamo.disable(found.forward_callable(compiled_fn=self._run_graph, extra_globals=names))

    def _run_graph(self, *arguments: Any) -> tuple[Marker, ...]:
        self.arguments = arguments
        return self.markers

    def __call__(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What the forward returns, markers in the place of the graph's results."""
        with torch._C._DisableTorchDispatch():
            return self.run(*self.owner, *args, **kwargs)


def dynamo_refusal(error: Exception) -> tuple[str, list[traceback.FrameSummary]]:
    """Why Dynamo could not follow a model, and the stack of the model's code where it stopped."""
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).rstrip(".")
    stack = [*(getattr(error, "real_stack", None) or ())]
    return reason, [frame for frame in stack if not is_torch_file(frame.filename)]


def changes_context(node: fx.Node) -> bool:
    """Whether a node of Dynamo's switches the grad mode, or enters or leaves autocast or inference mode."""
    return node.target in (
        torch._C._set_grad_enabled,
        torch.amp.autocast_mode._enter_autocast,
        torch.amp.autocast_mode._exit_autocast,
        torch.autograd.grad_mode._enter_inference_mode,
        torch.autograd.grad_mode._exit_inference_mode,
    )


def sets_grad_mode(node: fx.Node) -> bool:
    """Whether a node switches gradients on or off until another one does."""
    return node.target is torch._C._set_grad_enabled


def entered_context(node: fx.Node) -> tuple[Literal["grad_mode", "autocast"], tuple[tuple[str, Any], ...]] | None:
    """The kind and options of the context that a node enters; None for one that leaves autocast or inference mode.

    Inference mode is entered as `torch.no_grad()`: it computes the same, and autograd keeps the same.
    """
    if node.target is torch._C._set_grad_enabled:
        return "grad_mode", (("enabled", node.args[0]),)
    if node.target is torch.autograd.grad_mode._enter_inference_mode:
        return "grad_mode", (("enabled", not node.args[0]),)
    if node.target is torch.amp.autocast_mode._enter_autocast:
        return "autocast", tuple(zip(("device_type", "dtype", "enabled", "cache_enabled"), node.args, strict=False))
    return None


def is_checkpoint(node: fx.Node) -> bool:
    """Whether a node of Dynamo's is a checkpointed part."""
    return node.target is torch.ops.higher_order.tag_activation_checkpoint


def checkpoint_options_of_node(node: fx.Node) -> tuple[tuple[str, Any], ...]:
    """The keyword arguments of the call of `checkpoint` that a node stands for."""
    options = {name: value for name, value in node.kwargs.items() if value is not _CHECKPOINT_DEFAULTS.get(name)}
    if "_checkpoint_context_fn" in node.meta:
        options["context_fn"] = node.meta["_checkpoint_context_fn"]
    return tuple({**options, "use_reentrant": bool(node.kwargs.get("use_reentrant", False))}.items())


def of_self(path: str, found: DynamoGraph) -> str:
    """A path of Dynamo's as it is where a forward calls its model `self`."""
    return re.sub(rf"^L\['{found.self_name}'\]", "L['self']", path)


def applied_function(node: fx.Node) -> type[torch.autograd.Function] | None:
    """The function that a node of Dynamo's applies; None if it is another call."""
    function = inspect.getclosurevars(node.target).nonlocals.get("fn_cls") if inspect.isfunction(node.target) else None
    return function if inspect.isclass(function) and issubclass(function, torch.autograd.Function) else None


def reads_value(node: fx.Node) -> bool:
    """Whether a node of Dynamo's makes a number, or a shape, of the value of a tensor."""
    return "unbacked_bindings" in node.meta


def source_lines(node: fx.Node) -> list[traceback.FrameSummary]:
    """The lines of the model's code that a node of Dynamo's comes from, the innermost last."""
    found = re.findall(r'File "([^"]*)", line (\d+), in (\S*)', node.meta.get("stack_trace") or "")
    lines = [traceback.FrameSummary(file, int(line), name, lookup_line=False) for file, line, name in found]
    return [line for line in lines if not is_torch_file(line.filename)]


def present_fake_mode() -> FakeTensorMode:
    """The fake mode of the capture that is going on."""
    mode = detect_fake_mode()
    assert mode is not None
    return mode


def is_same_symbol(size: torch.SymInt, other: torch.SymInt) -> bool:
    """Whether two symbolic sizes are one."""
    return bool(size.node.expr == other.node.expr)


# Graph modules: their source code, and their state.


def codegen_of(graph: fx.Graph) -> fx.graph.CodeGen:
    """What makes the forward of a graph."""
    return graph._codegen


def function_name(code: fx.graph.CodeGen) -> str:
    """The name of the function that is generated."""
    return code._func_name


def tracer_of(graph: fx.Graph) -> type[fx.Tracer] | None:
    """The class of the tracer that made a graph."""
    return graph._tracer_cls


def root_of(graph: fx.Graph) -> fx.Node:
    """What stands before the first node and after the last one."""
    return graph._root


GRAPH_MODULE_CODE = ("_graph", "_code", "_lineno_map", "_prologue_start")
"""Attributes of a graph module that are made from its graph."""


def free_source_with(forward: Callable[..., Any]) -> None:
    """Forget the source code of a generated forward when the forward is freed: torch.fx would keep it for ever."""
    weakref.finalize(forward, _forget_source, forward.__code__.co_filename).atexit = False


def _forget_source(key: str) -> None:
    torch.fx.graph_module._loader.eval_cache.pop(key, None)
    linecache.cache.pop(key, None)


@contextlib.contextmanager
def _without_source() -> Iterator[None]:
    """Forget the source code of the graph modules that this thread makes inside: nobody calls them."""
    loader, thread, keys = torch.fx.graph_module._loader, threading.get_ident(), []
    cache = loader.cache

    def cache_and_note(*args: Any, **kwargs: Any) -> str:
        key = cache(*args, **kwargs)
        if threading.get_ident() == thread:
            keys.append(key)
        return key

    loader.cache = cache_and_note  # type: ignore[method-assign]
    try:
        yield
    finally:
        loader.cache = cache  # type: ignore[method-assign]
        for key in keys:
            _forget_source(key)


@functools.cache
def graph_module_names() -> frozenset[str]:
    """The attributes that a graph module has and other modules lack."""
    gm = fx.GraphModule(nn.Module(), fx.Graph())
    free_source_with(type(gm).forward)
    return frozenset(dir(gm)).difference(dir(nn.Module())).union(("_in_spec", "_out_spec"))


def call_deepcopy_hooks(gm: fx.GraphModule) -> None:
    """Tell those who asked for it that `gm` is a copy."""
    for hook in gm._deepcopy_hooks:
        hook(gm)


# Modules: children, parameters and buffers.


MODULE_TABLES = ("_parameters", "_buffers", "_modules")
"""Attributes in which a module holds its parameters, buffers and children."""


def entries(module: nn.Module) -> list[str]:
    """The names of a module's own children, parameters and buffers."""
    return [*module._modules, *module._parameters, *module._buffers]


def plain_tensors(model: nn.Module) -> list[torch.Tensor]:
    """The tensors that modules hold in plain attributes, and in tuples, lists and dicts among those."""
    values = [value for module in model.modules() for name, value in vars(module).items() if name not in MODULE_TABLES]
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def rename_entry(module: nn.Module, name: str, new: str) -> None:
    """Give a child, parameter or buffer another name, in its place among the others."""
    tables: tuple[dict[str, Any], ...] = (module._modules, module._parameters, module._buffers)
    for table in tables:
        items = [(new if key == name else key, value) for key, value in table.items()]
        table.clear()
        table.update(items)
    if name in module._non_persistent_buffers_set:
        module._non_persistent_buffers_set.symmetric_difference_update((name, new))


def versions_by_path(state: dict[str, Any]) -> dict[str, Any]:
    """What a state dict says of the module at each path, its version, to be edited in place."""
    return getattr(state, "_metadata", {})


def non_persistent_buffers(model: nn.Module) -> tuple[str, ...]:
    """The paths of the buffers that a model leaves out of its state dict."""
    return tuple(
        f"{path}.{name}".lstrip(".") for path, module in model.named_modules() for name in module._non_persistent_buffers_set
    )


def make_non_persistent(model: nn.Module, paths: Sequence[str]) -> None:
    """Leave the buffers at these paths, those that are there, out of the state dict."""
    modules = dict(model.named_modules())
    for path in paths:
        owner, _, name = path.rpartition(".")
        if owner in modules and name in modules[owner]._buffers:
            modules[owner]._non_persistent_buffers_set.add(name)


# The state of the process: what a caller may be inside of.


@contextlib.contextmanager
def neutral_state() -> Iterator[None]:
    """Run as at the top of a program, whatever the caller is inside of, but for autocast.

    Gradients are on; inference mode, anomaly mode, fake modes and other dispatch modes, hooks of saved tensors, a default device,
    and the log of fake tensors are off.
    """
    anomaly = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_without_saved_tensor_hooks())
        stack.enter_context(_silent_fake_tensors())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if anomaly[0]:
            torch.autograd.set_detect_anomaly(False)
            stack.callback(torch.autograd.set_detect_anomaly, *anomaly)
        yield


@contextlib.contextmanager
def _silent_fake_tensors() -> Iterator[None]:
    """Keep torch from logging each call that fails on fake tensors in this thread: the error says it."""
    log, thread = logging.getLogger(torch._subclasses.fake_tensor.__name__), threading.get_ident()

    def is_of_another_thread(record: logging.LogRecord) -> bool:
        return record.thread != thread

    log.addFilter(is_of_another_thread)
    try:
        yield
    finally:
        log.removeFilter(is_of_another_thread)


@contextlib.contextmanager
def _without_saved_tensor_hooks() -> Iterator[None]:
    """Keep the caller's hooks of saved tensors from seeing what is saved inside, also where hooks are disabled.

    Hooks that change nothing would not do: what an operator keeps of its own results would never be freed.
    """
    autograd = torch._C._autograd
    message = autograd._saved_tensors_hooks_get_disabled_error_message()
    if message is not None:
        autograd._saved_tensors_hooks_enable()
    hooks = []
    while top := autograd._top_saved_tensors_default_hooks(True):
        hooks.append(top)
        autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(hooks):
            autograd._push_saved_tensors_default_hooks(pack, unpack)
        if message is not None:
            autograd._saved_tensors_hooks_disable(message)


# Parameters and buffers, where modules hold them.


BatchNorm: TypeAlias = nn.modules.batchnorm._BatchNorm
"""Base of all batch norms."""

RunningNorm: TypeAlias = nn.modules.batchnorm._NormBase
"""Base of the norms that may keep running statistics."""


@dataclass(frozen=True)
class Slot:
    """A place of a module that holds `tensor`: a parameter, a buffer, or what `torch.func.functional_call` put there."""

    name: str
    tensor: torch.Tensor
    holder: dict[str, Any]

    def present(self) -> torch.Tensor:
        """What the place holds now."""
        return self.holder[self.name]  # type: ignore[no-any-return]

    def put(self, tensor: torch.Tensor) -> None:
        """Let the place hold another tensor."""
        self.holder[self.name] = tensor


def put_tensor(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put a tensor of any class in the place of a parameter or buffer, as `torch.func.functional_call` does."""
    holder = module._parameters if name in module._parameters else module._buffers
    holder[name] = tensor  # type: ignore[assignment]


def parameter_slots(module: nn.Module) -> list[Slot]:
    """The places of a module alone that hold parameters."""
    return [Slot(name, tensor, module._parameters) for name, tensor in module._parameters.items() if tensor is not None]


def buffer_slots(module: nn.Module) -> list[Slot]:
    """The places of a module alone that hold buffers."""
    return [Slot(name, tensor, module._buffers) for name, tensor in module._buffers.items() if tensor is not None]


# Operators: what is known of a function of torch's by the schema of its ATen operator.


@dataclass(frozen=True)
class Parameter:
    """A parameter of an ATen operator.

    Attributes:
        name: as the schema has it.
        kind: the type of a value, `TensorType`, `IntType`, ...; of a list, of its elements.
        is_list: whether a list is wanted; one of a fixed `size` takes a single number, too.
        is_optional: whether None is taken.
        has_default, default: the value where the parameter is left out.
        is_written: whether the operator writes to it.
        is_shown: whether what the operator returns shares its storage, or may.
    """

    name: str
    kind: str
    is_list: bool
    size: int | None
    is_optional: bool
    is_keyword: bool
    has_default: bool
    default: Any
    is_written: bool
    is_shown: bool


@dataclass(frozen=True)
class Schema:
    """The parameters of one overload of an ATen operator, and whether it draws random numbers."""

    operator: str
    overload: str
    parameters: tuple[Parameter, ...]
    draws: bool


def aten_name(function: Callable[..., Any]) -> str | None:
    """The name, `add`, of the ATen operator that a function of torch's is; None for functions written in Python."""
    from torch.jit._builtins import _find_builtin

    if isinstance(function, torch._ops.OpOverload):
        namespace, _, name = function._schema.name.partition("::")
        return name if namespace == "aten" else None
    if isinstance(function, torch._ops.OpOverloadPacket):
        return function.__name__
    return (_find_builtin(function) or "").removeprefix("aten::") or None  # type: ignore[no-untyped-call]


@functools.cache
def aten_schemas(name: str) -> tuple[Schema, ...]:
    """The overloads of an ATen operator; none where there is no operator of this name."""
    packet = getattr(torch.ops.aten, name, None) if name.isidentifier() else None
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return ()
    return tuple(schema_of(getattr(packet, overload)) for overload in packet.overloads())


@functools.cache
def schema_of(overload: torch._ops.OpOverload) -> Schema:
    """What is known of one overload."""
    shown = {name for result in overload._schema.returns if result.alias_info for name in result.alias_info.before_set}
    name = overload._schema.name.rpartition("::")[2]
    parameters = tuple(_parameter(argument, shown) for argument in overload._schema.arguments)
    return Schema(name, overload._schema.overload_name, parameters, torch.Tag.nondeterministic_seeded in overload.tags)


def _parameter(argument: Any, shown: set[str]) -> Parameter:
    kind, is_list, is_optional, alias = argument.type, False, False, argument.alias_info
    if kind.kind() == "OptionalType":
        kind, is_optional = kind.getElementType(), True
    if kind.kind() == "ListType":
        kind, is_list = kind.getElementType(), True
    return Parameter(
        argument.name, kind.kind(), is_list, argument.N, is_optional, argument.kwarg_only, argument.has_default_value(),
        argument.default_value, bool(alias and alias.is_write), bool(alias and not shown.isdisjoint(alias.before_set)),
    )  # fmt: skip


Overload, OverloadPacket = torch._ops.OpOverload, torch._ops.OpOverloadPacket
"""The types of `torch.ops.aten.add.Tensor` and `torch.ops.aten.add`."""

ATTENTION_MATH = torch.ops.aten._scaled_dot_product_attention_math
ATTENTION_FLASH = torch.ops.aten._scaled_dot_product_flash_attention
ATTENTION_EFFICIENT = torch.ops.aten._scaled_dot_product_efficient_attention
"""The kernels of attention: by its matrix products, which returns the map, too, and the two fused ones of GPUs."""

ATTENTION_MAPS = (
    torch.ops.aten._softmax,
    torch.ops.aten._safe_softmax,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    ATTENTION_FLASH,
    ATTENTION_EFFICIENT,
    ATTENTION_MATH,
)
"""What a softmax or a fused attention calls below autograd."""

batch_norm_with_statistics = torch._batch_norm_impl_index
"""What `F.batch_norm` calls: it returns the statistics of the batch, too."""


CONJUGATE = "_conj"
"""The ATen operator that `Tensor.conj` calls."""


def full_name(overload: torch._ops.OpOverload) -> str:
    """`aten::add` for each of its overloads."""
    return overload._schema.name


def is_mutable(overload: torch._ops.OpOverload) -> bool:
    """Whether an operator writes to one of its operands."""
    return overload._schema.is_mutable


def overload_of(operator: torch.library.CustomOpDef) -> torch._ops.OpOverload:
    """What dispatch modes see where a custom operator is called."""
    return operator._opoverload


def check_dimensions(norm: BatchNorm, x: torch.Tensor) -> None:
    """Raise the error of a batch norm that is given an input of other dimensions."""
    norm._check_input_dim(x)  # type: ignore[operator]


# Autograd and dispatch, at run time.


def run_backward(value: torch.Tensor) -> None:
    """`value.backward()` for a fake number: without reading whether it is one."""
    _engine_run_backward((value,), (torch.ones_like(value),), False, False, (), allow_unreachable=True, accumulate_grad=True)


def current_autograd_node() -> Any:
    """The node whose backward is running; None outside of one."""
    return torch._C._current_autograd_node()


def saved_attributes(function: Any) -> dict[str, str]:
    """The attributes of an autograd node that hold what it keeps, as packed by hooks -> what to call it."""
    names = dir(function)
    found = {name: name.removeprefix("_raw_saved_") for name in names if name.startswith("_raw_saved_")}
    return found | {"_raw_saved_tensors": "saved_tensors"} if "saved_tensors" in names else found


def packed_by_hooks(function: Any, attribute: str) -> list[Any]:
    """What an attribute of an autograd node holds, as saved-tensor hooks packed it."""
    saved = getattr(function, attribute)
    return [s.data for s in (saved if isinstance(saved, tuple) else (saved,))]


def operator_of_backward(name: str) -> str | None:
    """The name of this package's operator whose backward is an autograd node of the type `name`."""
    found = re.fullmatch(r"GeneratedBackwardFor_s2a_fx_(\w+)_defaultBackward", name)
    return found[1] if found else None


def below_autograd_and_autocast() -> contextlib.AbstractContextManager[Any]:
    """Run operators as inside of one: what they call sees neither autograd nor autocast."""
    stack = contextlib.ExitStack()
    stack.enter_context(torch._C._AutoDispatchBelowADInplaceOrView())
    stack.enter_context(torch._C._DisableAutocast())
    return stack


without_dispatch_modes = _disable_current_modes
"""Run on real tensors inside of fake modes and other dispatch modes."""

ALLOCATION = torch._C._profiler._EventType.Allocation
"""The tag of what the profiler tells of memory."""


# Compilers. Each is imported when it is asked for: `import torch._inductor` takes seconds.


def mark_dynamic(tensor: torch.Tensor, dimension: int) -> None:
    """Let Dynamo take a dimension for a symbol, if its code allows that."""
    torch._dynamo.maybe_mark_dynamic(tensor, dimension)


def backend_named(name: str) -> Callable[..., Any]:
    """The backend that `torch.compile(backend=name)` takes."""
    from torch._dynamo import lookup_backend

    return lookup_backend(name)


def dynamo_exception() -> type[Exception]:
    """The base of what Dynamo raises where it cannot follow."""
    return torch._dynamo.exc.TorchDynamoException


def without_autograd_cache() -> contextlib.AbstractContextManager[Any]:
    """AOTAutograd hands each graph to the compiler, also one that it has seen."""
    from torch._functorch import config

    return config.patch(enable_autograd_cache=False)  # type: ignore[attr-defined, no-any-return]


def boxed(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function in the form in which AOTAutograd calls compiled graphs."""
    from torch._functorch.aot_autograd import make_boxed_func

    return make_boxed_func(function)  # type: ignore[no-any-return]


def compile_by_inductor(gm: fx.GraphModule, inputs: Any, compile_graph: Callable[..., Any]) -> Any:
    """All that Inductor does with a graph and its backward, but for code: each final graph goes to `compile_graph`."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(gm, inputs, inner_compile=compile_graph)


def forward_metadata() -> Any:
    """What AOTAutograd knows of the forward that it is compiling: which results are the model's, and which are saved."""
    metadata = torch._guards.TracingContext.get().fw_metadata
    assert metadata is not None
    return metadata


def partitioner_interface() -> tuple[Any, Any]:
    """The base of Inductor's custom partitioners, and what hashes their files; `object` and None where torch has none."""
    try:
        from torch._inductor.custom_graph_pass import CustomPartitionerFn, get_hash_for_files
    except ImportError:
        return object, None
    return CustomPartitionerFn, get_hash_for_files


def min_cut_partition(gm: fx.GraphModule, joint_inputs: Sequence[object], **options: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The forward and the backward of a joint graph, as Inductor parts them."""
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    return min_cut_rematerialization_partition(gm, joint_inputs, **options)


def inlines_saved_tensor_hooks() -> bool:
    """Whether AOTAutograd makes hooks of saved tensors part of its graphs."""
    return hasattr(getattr(torch._functorch._aot_autograd, "utils", None), "saved_tensors_hooks_are_inlineable")
