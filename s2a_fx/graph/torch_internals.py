"""Every name of torch that torch does not promise to keep, in one place.

Each has what it is used for. All were tried on torch 2.11 and 2.14.
"""

import contextlib
import inspect
import linecache
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import _disable_current_modes

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


# Tensors: identity, versions, and values that fake ones do not have.

READS_VALUE = (DataDependentOutputException, DynamicOutputShapeException)
"""Raised where a fake tensor is asked for its value, or for a shape that depends on it."""


def storage_key(tensor: torch.Tensor) -> int:
    """A number that is the same for tensors which share a storage, for as long as it lives."""
    return tensor.untyped_storage()._cdata


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
        result: what the forward returns, `markers` in the place of what the graph returns.
    """

    graph_module: fx.GraphModule
    arguments: Sequence[Any]
    result: Any
    markers: Sequence[Any]


def dynamo_graph(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], leaves: Sequence[torch.Tensor]) -> DynamoGraph:
    """Capture the forward of `model`; the first dimension of each of `leaves` stays symbolic where the model lets it."""
    from torch._dynamo.functional_export import dynamo_graph_capture_for_export

    for leaf in leaves:
        if leaf.ndim and leaf.shape[0] > 1:
            torch._dynamo.maybe_mark_dynamic(leaf, 0)
    gm = dynamo_graph_capture_for_export(model)(*args, **kwargs)
    given = (*args, *kwargs.values())
    outputs: Any = gm.graph.output_node().args[0]
    markers = [_Marker() for _ in outputs]
    return DynamoGraph(gm, gm._dynamo_bytecode_flatten(*given), gm._dynamo_bytecode_unflatten(tuple(markers), given), markers)


class _Marker:
    """Stands for a tensor that a graph returns."""


def dynamo_refusal(error: Exception) -> str:
    """Why Dynamo could not follow a model, and the line of the model where it stopped."""
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).rstrip(".")
    stack = getattr(error, "real_stack", None) or ()
    frames = [frame for frame in stack if not frame.filename.startswith(torch.__path__[0])]
    place = f"line {frames[-1].lineno} of {frames[-1].filename}: " if frames else ""
    return f"{place}Dynamo cannot follow it ({reason})"


def changes_context(node: fx.Node) -> bool:
    """Whether a node of Dynamo's switches the grad mode, or enters or leaves autocast."""
    return node.target in (
        torch._C._set_grad_enabled,
        torch.amp.autocast_mode._enter_autocast,
        torch.amp.autocast_mode._exit_autocast,
    )


def entered_context(node: fx.Node) -> tuple[str, tuple[tuple[str, Any], ...]] | None:
    """The kind and options of the context that a node enters; None for one that leaves autocast."""
    if node.target is torch._C._set_grad_enabled:
        return "grad_mode", (("enabled", node.args[0]),)
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


def is_same_symbol(size: torch.SymInt, other: torch.SymInt) -> bool:
    """Whether two symbolic sizes are one."""
    return bool(size.node.expr == other.node.expr)


# Graph modules: their source code, and their state.

GRAPH_MODULE_CODE = ("_graph", "_code", "_lineno_map", "_prologue_start")
"""Attributes of a graph module that are made from its graph."""


def free_source_with(forward: Callable[..., Any]) -> None:
    """Forget the source code of a generated forward when the forward is freed: torch.fx would keep it for ever."""
    weakref.finalize(forward, _forget_source, forward.__code__.co_filename).atexit = False


def _forget_source(key: str) -> None:
    torch.fx.graph_module._loader.eval_cache.pop(key, None)
    linecache.cache.pop(key, None)


def call_after_deepcopy(gm: fx.GraphModule, hook: Callable[[fx.GraphModule], None]) -> None:
    """Call `hook` with each deep copy of a graph module."""
    gm._register_deepcopy_hook(hook)


# Buffers.


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

    Gradients are on; inference mode, anomaly mode, fake modes and other dispatch modes, hooks of saved tensors, and a default
    device are off.
    """
    anomaly = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_own_saved_tensor_hooks())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if anomaly[0]:
            torch.autograd.set_detect_anomaly(False)
            stack.callback(torch.autograd.set_detect_anomaly, *anomaly)
        yield


@contextlib.contextmanager
def _own_saved_tensor_hooks() -> Iterator[None]:
    """Keep the caller's hooks of saved tensors from seeing what is saved inside, also where hooks are disabled."""
    message = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()
    if message is not None:
        torch._C._autograd._saved_tensors_hooks_enable()
    try:
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            yield
    finally:
        if message is not None:
            torch._C._autograd._saved_tensors_hooks_disable(message)


# Parameters, where modules hold them.


@dataclass(frozen=True)
class WeightSlot:
    """A place of a module that holds `tensor`, a parameter or what `torch.func.functional_call` put there."""

    name: str
    tensor: torch.Tensor
    holder: dict[str, Any]

    def present(self) -> torch.Tensor:
        """What the place holds now."""
        return self.holder[self.name]  # type: ignore[no-any-return]

    def put(self, tensor: torch.Tensor) -> None:
        """Let the place hold another tensor."""
        self.holder[self.name] = tensor


def weight_slots(module: nn.Module) -> list[WeightSlot]:
    """The places of a module and those inside it that hold parameters."""
    return [WeightSlot(name, p, m._parameters) for m in module.modules() for name, p in m._parameters.items() if p is not None]
