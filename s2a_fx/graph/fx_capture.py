"""Capture a model's forward by torch.fx.

torch.fx runs the forward on proxies and writes down each call that a proxy takes part in. This tracer also sees what torch.fx
alone drops:

1. a call that draws random numbers without a proxy (`torch.randn(64)`) becomes a node, not a constant;
2. `torch.no_grad()`, `torch.autocast()` and `torch.utils.checkpoint.checkpoint()` around a node become its scopes;
3. forward hooks of the modules that are traced through, the model itself included, become nodes that call them;
4. augmented assignments (`x += y`) stay writes;
5. the shape of a parameter or buffer is a constant, and no node;
6. `float()` and `int()` of a size are nodes.

torch.fx patches `nn.Module.__call__` and `__getattr__` for the whole process. So does this tracer, one trace at a time: these and
`__setattr__`, entering and leaving `torch.autocast`, the functions of `math`, and in the globals of the model's files the names of
functions that stay one node. What other threads call passes straight through. Where a file calls `float` or `int` on a size, these
names are replaced in it, too.
"""

import contextlib
import dis
import functools
import math
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import get_notrace_functions, get_notrace_modules
from torch import fx, nn
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property

from s2a_fx.errors import TraceError
from s2a_fx.graph import hooks
from s2a_fx.graph.inputs import Signature, Structure
from s2a_fx.graph.lasting_state import state_restored
from s2a_fx.graph.model_code import first_line, namespaces_of, place_of_error
from s2a_fx.graph.regions import SCOPES, Scope
from s2a_fx.graph.spellings import ASSIGNMENTS
from s2a_fx.graph.torch_internals import (
    CHECKPOINT_CODE,
    FakeTensor,
    TorchDispatchMode,
    autocast_options,
    checkpoint_options,
    has_backward_hooks,
    is_mutable,
    storage_key,
    tree_any,
    tree_flatten,
    tree_unflatten,
    without_autocast,
)

_LOCK = threading.RLock()
THROUGH = (
    nn.Sequential, nn.MultiheadAttention, nn.Transformer, nn.TransformerEncoder, nn.TransformerEncoderLayer,
    nn.TransformerDecoder, nn.TransformerDecoderLayer,
)  # fmt: skip
"""Modules of `torch.nn` that are traced through: what they are made of is what passes rewrite."""


_DTYPES: dict[type, torch.dtype] = {float: torch.float64, int: torch.int64, bool: torch.bool, complex: torch.complex128}


@dataclass(frozen=True)
class Captured:
    """A flat captured graph over a model's own modules and tensors.

    Attributes:
        graph: has a placeholder for each tensor of the inputs, scopes as metadata, and returns a tuple.
        structure: the structure of what the model returns.
        other_sizes: batch sizes for which the graph may do something else than the model.
    """

    graph: fx.Graph
    structure: Structure
    other_sizes: tuple[int, ...] = ()


def capture_by_fx(model: nn.Module, signature: Signature) -> Captured:
    """Capture `model` in the mode in which it stands.

    Args:
        model: a private copy; its modules become those of the graph.
        signature: how the model is called.

    Raises:
        TraceError: torch.fx cannot follow the model, or it has backward hooks; names the module and the line.
    """
    converting: list[dict[str, Any]] = []
    while True:
        try:
            with _LOCK:
                return Captured(*ModelTracer(converting).capture(model, signature))
        except _Converts as found:
            converting.append(found.namespace)


class BufferTracer(fx.Tracer):
    """A tracer for which reading a buffer is a node: no constant of the tracing device is baked in. Unpickling uses it too."""

    proxy_buffer_attributes = True


class ModelTracer(BufferTracer):
    """Traces one model, once.

    Args:
        converting: globals of the model's files in which `float` and `int` make nodes.
    """

    def __init__(self, converting: Sequence[dict[str, Any]]) -> None:
        super().__init__()
        self.converting = converting
        self.thread = threading.get_ident()
        self.autocasts: list[Scope] = []
        self.checkpoints: dict[FrameType, Scope] = {}
        self.idents = iter(range(sys.maxsize))
        self.no_grad: tuple[tuple[Scope, ...], Scope] | None = None  # the scope of the last node, and what is around it
        self.outermost: FrameType | None = None
        self.unpacked: dict[CodeType, dict[int, int]] = {}

    def capture(self, model: nn.Module, signature: Signature) -> tuple[fx.Graph, Any]:
        """The graph of the model's forward, and the structure of its result."""
        self.root, self.root_module_name = model, type(model).__name__
        self.submodule_paths = {module: path for path, module in model.named_modules()}
        self.tensor_attrs = dict(plain_tensors(model))
        self.tensor_paths = {id(t): path for path, t in [*model.named_parameters(), *model.named_buffers()]}
        self.storages = {storage_key(t) for t in (*model.parameters(), *model.buffers())}
        self.graph = fx.Graph(tracer_cls=type(self))
        self.outermost = sys._getframe()
        leaves = [self.create_proxy("placeholder", name, (), {}) for name in signature.names]
        args, kwargs = signature.arguments(leaves)
        try:
            with contextlib.ExitStack() as around:
                for context in (torch.inference_mode(False), torch.enable_grad(), without_autocast(), state_restored(model)):
                    around.enter_context(context)
                around.enter_context(self._patches(model))
                around.enter_context(_SeeActs(self))
                result = self._run(model, args, kwargs)
            vars(model).update((path, tensor) for tensor, path in self.tensor_attrs.items() if "." not in path)
            results, spec = Structure.of(result)
            self.create_node("output", "output", (self.create_arg(tuple(results)),), {})
        except TraceError:
            raise
        except Exception as error:
            path = next(reversed(self.module_stack.values()), ("",))[0]
            raise TraceError(f"{place_of_error(model, path, error)}: torch.fx cannot follow it ({first_line(error)})") from error
        finally:
            self.outermost = None
            self.checkpoints.clear()
        return self.graph, spec

    def count_unpacked(self, code: CodeType, offset: int) -> int | None:
        """Into how many names an instruction unpacks a value; None for another instruction. torch.fx reads the code each time."""
        if code not in self.unpacked:
            found = (i for i in dis.get_instructions(code) if i.opname == "UNPACK_SEQUENCE")
            self.unpacked[code] = {i.offset: i.argval for i in found}
        return self.unpacked[code].get(offset)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if m not in (self.submodule_paths or {}):
            raise TraceError(f"{type(m).__name__}: is called, but is no submodule of the model; assign it to an attribute.")
        return super().call_module(m, lambda *args, **kwargs: self._run(m, args, kwargs), args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        path = self.tensor_paths.get(id(attr_val))
        if path is None:
            return attr_val
        if path not in parameter_proxy_cache:
            make = functools.partial(_WeightProxy, tracer=self, tensor=attr_val)
            parameter_proxy_cache[path] = self.create_proxy("get_attr", path, (), {}, proxy_factory_fn=make)
        return parameter_proxy_cache[path]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        """As torch.fx does, but equal constants of the captures of both modes are one attribute."""
        if isinstance(a, np.generic):  # `math.pi / np.sqrt(8)`, which source code writes as NumPy's
            return a.item()
        if isinstance(a, type) and a in _DTYPES:  # `x.to(float)`, whose source code torch.fx would write as a class's
            return _DTYPES[a]
        if isinstance(a, torch.Tensor) and id(a) not in self.tensor_paths and a not in self.tensor_attrs:
            for known, path in self.tensor_attrs.items():
                if "." not in path and isinstance(known, torch.Tensor) and is_same_constant(a, known):
                    self.tensor_attrs[a] = path
                    break
        return super().create_arg(a)

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, target, *args, **kwargs)
        if kind.startswith("call"):
            node.meta[SCOPES] = self._scopes()
        return node

    def _run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a module that is traced through; its forward hooks become nodes."""
        if has_backward_hooks(module):
            path = (self.submodule_paths or {}).get(module)
            raise TraceError(
                f"{path or 'the model itself'} ({type(module).__name__}): has backward hooks, which a graph cannot run; "
                "remove them, or register them on the layers inside."
            )
        for pre_hook in hooks.forward_pre_hooks_of(module):
            args, kwargs = self._call_hook(pre_hook, (args, kwargs), args, kwargs)
        result = module.forward(*args, **kwargs)
        for hook in hooks.forward_hooks_of(module):
            result = self._call_hook(hook, result, args, kwargs, result)
        return result

    def _call_hook(self, hook: nn.Module, value: Any, *operands: Any) -> Any:
        """The node that runs a hook on `operands`, and `value` with its tensors as the hook returns them."""
        path = next((name for name, child in self.root.named_children() if hooks.is_same(child, hook)), None)
        if path is None:
            path = self.get_fresh_qualname("forward_hook_")
            self.root.add_module(path, hook)
        leaves, spec = tree_flatten(value)
        returned: Any = self.create_proxy("call_module", path, operands, {})
        return tree_unflatten([returned[i] if isinstance(v, fx.Proxy) else v for i, v in enumerate(leaves)], spec)

    def _scopes(self) -> tuple[Scope, ...]:
        """The contexts around the present call."""
        checkpoints = self._checkpoints()
        around = (*checkpoints, *self.autocasts)
        if torch.is_grad_enabled() or any(dict(c.options)["use_reentrant"] for c in checkpoints):
            self.no_grad = None  # a reentrant checkpoint itself runs its function without gradients
            return around
        if self.no_grad is None or self.no_grad[0] != around:
            self.no_grad = around, Scope("grad_mode", next(self.idents), (("enabled", False),))
        return (*around, self.no_grad[1])

    def _checkpoints(self) -> tuple[Scope, ...]:
        """The calls of `torch.utils.checkpoint.checkpoint` on the stack, outermost first."""
        found = []
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame is not self.outermost:
            if frame.f_code is CHECKPOINT_CODE:
                if frame not in self.checkpoints:
                    self.checkpoints[frame] = Scope("checkpoint", next(self.idents), checkpoint_options(frame.f_locals))
                found.append(self.checkpoints[frame])
            frame = frame.f_back
        return tuple(reversed(found))

    @contextlib.contextmanager
    def _patches(self, model: nn.Module) -> Iterator[None]:
        """Let calls and attributes of modules, autocast, and functions that stay one node come by this tracer."""
        cache: dict[str, fx.Proxy] = {}
        call, read = nn.Module.__call__, nn.Module.__getattr__
        write = nn.Module.__setattr__
        enter, leave = torch.autocast.__enter__, torch.autocast.__exit__

        def call_module(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not self._is_here():
                return call(module, *args, **kwargs)
            return self.call_module(module, module.forward, args, kwargs)

        def read_attribute(module: nn.Module, name: str) -> Any:
            value = read(module, name)
            return self.getattr(name, value, cache) if self._is_here() else value

        def write_attribute(module: nn.Module, name: str, value: Any) -> None:
            buffers = dict(module.named_buffers(recurse=False)) if self._is_here() and isinstance(value, fx.Proxy) else {}
            if name in buffers:  # `self.n += 1` writes in place; another tensor is missed in the comparison with the model
                cache[self.tensor_paths[id(buffers[name])]] = value
            else:
                write(module, name, value)

        def enter_autocast(context: torch.autocast) -> Any:
            if self._is_here():
                self.autocasts.append(Scope("autocast", next(self.idents), autocast_options(context)))
            return enter(context)

        def leave_autocast(context: torch.autocast, *error: Any) -> Any:
            if self._is_here():
                self.autocasts.pop()
            return leave(context, *error)

        patched: list[tuple[Any, str, Any]] = [
            (nn.Module, "__call__", call_module),
            (nn.Module, "__getattr__", read_attribute),
            (nn.Module, "__setattr__", write_attribute),
            (torch.autocast, "__enter__", enter_autocast),
            (torch.autocast, "__exit__", leave_autocast),
        ]
        with contextlib.ExitStack() as restored:
            for owner, name, value in patched:
                restored.callback(setattr, owner, name, vars(owner)[name])
                setattr(owner, name, value)
            for namespace in self.converting:
                for kind in (float, int):
                    if kind.__name__ not in namespace:
                        restored.callback(namespace.pop, kind.__name__, None)
                        namespace[kind.__name__] = _NumberType(kind.__name__, (), {"kind": kind, "tracer": self})
            for namespace, name, function in list(self._leaf_functions(model)):
                restored.callback(namespace.__setitem__, name, function)
                namespace[name] = self._leaf_function(function)
            yield

    def refuse_number(self, frame: FrameType) -> BaseException:
        """What to raise where a frame makes a number of a proxy."""
        if any(frame.f_globals is namespace for namespace in self.converting):
            return TypeError("a number that depends on the inputs is no constant")
        return _Converts(frame.f_globals)

    def _is_here(self) -> bool:
        return threading.get_ident() == self.thread

    def _leaf_functions(self, model: nn.Module) -> Iterator[tuple[dict[str, Any], str, Callable[..., Any]]]:
        """Where the files of the model's classes name a function that stays one node."""
        leaves = {id(f): f for f in (*get_notrace_functions(), *(f for f in vars(math).values() if callable(f)))}
        for namespace in (vars(math), *namespaces_of(model)):
            for name, value in list(namespace.items()):
                if id(value) in leaves and not name.startswith("_"):
                    yield namespace, name, value

    def _leaf_function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if self._is_here() and _holds_proxy((args, kwargs)):
                return self.create_proxy("call_function", function, args, kwargs)
            return function(*args, **kwargs)

        return wrapper


class _Converts(BaseException):
    """Raised where a file calls `float` or `int` on a proxy, and these names do not yet make nodes there."""

    def __init__(self, namespace: dict[str, Any]) -> None:
        super().__init__()
        self.namespace = namespace


class _NumberType(type):
    """Stands for `float` or `int` while a model is traced whose file converts sizes: called on a proxy, it makes a node (6).

    Python takes nothing but a number from `__int__`, so that the name must stand for something else.
    """

    kind: Any
    tracer: ModelTracer

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls.tracer._is_here() and _holds_proxy(args):
            return cls.tracer.create_proxy("call_function", cls.kind, args, kwargs)
        return cls.kind(*args, **kwargs)

    def __eq__(cls, other: Any) -> bool:
        return cls is other or cls.kind is other

    def __hash__(cls) -> int:
        return hash(cls.kind)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.kind)

    def __subclasscheck__(cls, subclass: Any) -> bool:
        return issubclass(subclass, cls.kind)


class _Proxy(fx.Proxy):
    """A proxy whose augmented assignments are writes (4): without these methods Python would take `x = x + y` for `x += y`."""

    tracer: "ModelTracer"

    def __getattr__(self, name: str) -> "_Attribute":
        return _Attribute(self, name)

    def __iter__(self) -> Iterator[fx.Proxy]:
        frame = sys._getframe(1)
        count = self.tracer.count_unpacked(frame.f_code, frame.f_lasti)
        return self.tracer.iter(self) if count is None else (self[index] for index in range(count))  # type: ignore[index]

    def __int__(self) -> int:
        raise self.tracer.refuse_number(sys._getframe(1))

    def __float__(self) -> float:
        raise self.tracer.refuse_number(sys._getframe(1))


def _assigning(function: Callable[..., Any]) -> Callable[[_Proxy, Any], fx.Proxy]:
    return lambda proxy, other: proxy.tracer.create_proxy("call_function", function, (proxy, other), {})


class _Attribute(_Proxy, fx.proxy.Attribute):
    """An attribute of a proxy, such as its shape: unpacked, assigned to and made a number as a proxy is."""


for _function in ASSIGNMENTS:
    setattr(_Proxy, f"__{_function.__name__}__", _assigning(_function))


class _WeightProxy(_Proxy):
    """A parameter or buffer, whose shape does not change (5)."""

    def __init__(self, node: fx.Node, *, tracer: ModelTracer, tensor: torch.Tensor) -> None:
        super().__init__(node, tracer)
        self.tensor = tensor

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    @property
    def ndim(self) -> int:
        return self.tensor.ndim

    def size(self, *dimension: int) -> Any:
        return self.tensor.size(*dimension)

    def dim(self) -> int:
        return self.tensor.dim()

    def numel(self) -> int:
        return self.tensor.numel()

    def nelement(self) -> int:
        return self.tensor.nelement()

    def __len__(self) -> int:
        return len(self.tensor)


class _Acts(BaseException):
    """Raised in the place of an operator that must be a node."""


class _RefuseActs(TorchDispatchMode):
    """Refuses what must be a node: draws, and writes to tensors of the model, whose storages these are."""

    def __init__(self, storages: Collection[int]) -> None:
        super().__init__()
        self.storages = storages

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise _Acts
        if is_mutable(func) and any(isinstance(a, torch.Tensor) and storage_key(a) in self.storages for a in args):
            raise _Acts
        return func(*args, **(kwargs or {}))


class _SeeActs(TorchFunctionMode):
    """Makes nodes of the calls of torch that draw random numbers, or write to the model, without a proxy (1)."""

    def __init__(self, tracer: ModelTracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            raise TraceError("torch.fx takes an attention for one call, and not for the layers that it is made of")
        if _holds_proxy((args, kwargs)):
            return func(*args, **kwargs)
        try:
            with _RefuseActs(self.tracer.storages):
                return func(*args, **kwargs)
        except _Acts:
            if is_tensor_method_or_property(func):
                return self.tracer.create_proxy("call_method", func.__name__, args, kwargs)
            return self.tracer.create_proxy("call_function", func, args, kwargs)


def _holds_proxy(arguments: Any) -> bool:
    return tree_any(lambda leaf: isinstance(leaf, fx.Proxy), arguments)


def plain_tensors(model: nn.Module) -> Iterator[tuple[torch.Tensor, str]]:
    """The tensors that modules hold as plain attributes, each with its path."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                yield value, f"{path}.{name}".lstrip(".")


def is_same_constant(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors that a forward made are equal; those of the meta device are if they look alike."""
    if (a.shape, a.dtype, a.device, a.stride()) != (b.shape, b.dtype, b.device, b.stride()):
        return False
    return a.device.type == "meta" or isinstance(a, FakeTensor) or torch.equal(a, b)


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is one call, and not traced through."""
    return (
        type(module) in get_notrace_modules()
        or is_childless_switch(module)
        or isinstance(module, nn.Linear)  # timm's thin subclass, which only spells out its autocast
        or type(module).__module__.startswith("s2a_fx.")
        or (type(module) not in THROUGH and type(module).__module__.startswith(("torch.nn", "torch.ao.nn")))
    )


def is_childless_switch(module: nn.Module) -> bool:
    """Whether a module without children reads `self.training`: it stays one call, which switches by itself."""
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and "training" in code.co_names and next(module.children(), None) is None
