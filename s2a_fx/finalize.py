"""`finalize`: a rewritten model as an ordinary inference model, which needs no s2a_fx.

    before  CodedMLP(x, w1, b1, w2, b2)               after  linear(gelu(linear(x, w1, b1)), w2, b2)
    before  RecomputedBranch(x), Checkpointed(x)      after  the nodes that it stands for
    before  LowRankPrompt(x)                          after  x + constant
    before  layer(x) + B(A(x)) * scale                after  layer(x), B A * scale added to its weight
    before  dropout, drop path, identity              after  nothing

A module says itself what it is at inference: its method `inference_form` is called on proxies and leaves plain nodes. What is made
of parameters alone becomes a constant. Modules without that method stay.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from s2a_fx.errors import InputError
from s2a_fx.graph import torch_internals
from s2a_fx.graph.call_code import CallCode
from s2a_fx.graph.calls import Call, call_of, is_in_place, written_operand
from s2a_fx.graph.capture import share_weights
from s2a_fx.graph.edit import free_path
from s2a_fx.graph.flow import attribute, eliminate_dead_code
from s2a_fx.graph.spellings import DROPOUTS
from s2a_fx.graph.torch_internals import free_source_with, has_hooks
from s2a_fx.nn.recompute import Recomputed
from s2a_fx.passes.merge_low_rank import merge_low_rank
from s2a_fx.sharded import is_spread


def finalize(gm: fx.GraphModule) -> fx.GraphModule:
    """An inference model that computes what `gm.eval()` computes, of torch's and timm's layers alone.

    Args:
        gm: what `s2a_fx.transform` returned, in either mode. It is left as it is, and shares the storages of all weights that
            were not folded with the result: after more training, finalize again, or train a `copy.deepcopy`.

    Returns:
        A graph module in eval mode, nothing of which needs a gradient. `torch.export.export(module, (x,), strict=False)` takes it,
        its batch dynamic.

    Raises:
        InputError: `gm` is no graph module, is spread over processes, or has hooks where plain operators take its place.
    """
    if not isinstance(gm, fx.GraphModule):
        raise InputError(
            f"got a {type(gm).__name__}, wanted what s2a_fx.transform(model, inputs, recipe) returns; "
            "if it is wrapped (DDP, torch.compile), give what is inside (.module, ._orig_mod)."
        )
    if is_spread(gm):
        raise InputError(
            "the weights are spread over processes (FSDP2); save_adapter() there, load_adapter() in one process, finalize that."
        )
    owned: Any = share_weights(gm)
    nn.Module.eval(owned)  # that of a graph of torch.export refuses
    owned.requires_grad_(False)
    with torch.no_grad():
        plain = _written(owned, type(gm).__name__)
        _leave_out_what_does_nothing(plain)
        merge_low_rank(plain)
    eliminate_dead_code(plain)
    plain.graph.lint()
    plain.delete_all_unused_submodules()
    plain.recompile()
    free_source_with(type(plain).forward)
    return plain.eval()


def _written(gm: Any, name: str) -> fx.GraphModule:
    writer = _Writer(gm)
    inputs = [writer.create_proxy("placeholder", n.target, n.args, {}) for n in gm.graph.nodes if n.op == "placeholder"]
    code, inference = torch_internals.codegen_of(gm.graph), _Inference(gm, writer)
    if isinstance(code, CallCode):
        result = code.eval_result(inference.run(*inputs, enable_io_processing=False))
    else:
        result = inference.run(*inputs)
    writer.graph.output(writer.create_arg(result))
    return _graph_module(writer.root, writer.graph, name)


def _graph_module(root: nn.Module, graph: fx.Graph, name: str) -> fx.GraphModule:
    gm = fx.GraphModule(root, graph, name)
    free_source_with(type(gm).forward)
    return gm


class _Writer(fx.proxy.GraphAppendingTracer):
    """Writes nodes into a new graph, and what they refer to into a new root: under its old path, or as a constant."""

    def __init__(self, gm: nn.Module) -> None:
        super().__init__(fx.Graph())
        self.root = _graph_module(nn.Module(), fx.Graph(), "Finalized")
        self.paths = {id(t): path for path, t in [*gm.named_buffers(), *gm.named_parameters()]}

    def create_arg(self, a: Any) -> Any:
        if not isinstance(a, torch.Tensor):
            return super().create_arg(a)
        if id(a) not in self.paths and a.untyped_storage().nbytes() != a.nbytes:
            a = a.clone(memory_format=torch.contiguous_format)  # a part of a weight would be saved with the whole of it
        path = self.place(self.paths.get(id(a), "constants.value"), a)
        self.paths[id(a)] = path  # it is alive from now on
        return self.create_node("get_attr", path, (), {})

    def place(self, path: str, value: nn.Module | torch.Tensor) -> str:
        """Put a module or a tensor into the root, if it is not there yet; returns where it is."""
        parent, _, name = path.rpartition(".")
        try:
            if attribute(self.root, path) is value:
                return path
        except AttributeError:
            pass
        path = free_path(self.root, parent, name)
        parent, _, name = path.rpartition(".")
        if isinstance(value, nn.Module):
            self.root.add_submodule(path, value)
            return path
        if parent and not _has(self.root, parent):
            self.root.add_submodule(parent, nn.Module())
        owner = self.root.get_submodule(parent)
        if isinstance(value, nn.Parameter):
            owner.register_parameter(name, value)
        else:
            owner.register_buffer(name, value)
        return path


def _has(root: nn.Module, path: str) -> bool:
    try:
        root.get_submodule(path)
    except AttributeError:
        return False
    return True


class _Inference(fx.Interpreter):
    """Runs a graph on proxies, module by module in its inference form; what depends on no proxy, it computes."""

    def __init__(self, gm: fx.GraphModule, writer: _Writer) -> None:
        super().__init__(gm)
        self.writer = writer

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _is_constant(target, args, kwargs) or _is_ours(target):
            return target(*args, **kwargs)
        return self.writer.create_proxy("call_function", target, args, kwargs)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _is_constant(target, args, kwargs):
            return super().call_method(target, args, kwargs)
        return self.writer.create_proxy("call_method", target, args, kwargs)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module: Any = self.fetch_attr(target)
        if not _reads_proxies(args, kwargs) and not is_in_place(module):
            return module(*args, **kwargs)
        plain = isinstance(module, Recomputed) or hasattr(module, "inference_form")
        if plain and has_hooks(module):
            raise InputError(f"{target}: has hooks, which plain operators in its place would leave out; remove them first.")
        if isinstance(module, Recomputed):
            return _Inference(module.body, self.writer).run(*module.of_body(*args))
        if hasattr(module, "inference_form"):
            return module.inference_form(*args, **kwargs)
        return self.writer.create_proxy("call_module", self.writer.place(target, module), args, kwargs)


def _is_constant(target: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call of a function or method reads no proxy, and overwrites nothing."""
    return not _reads_proxies(args, kwargs) and written_operand(target, args, kwargs) is None


def _reads_proxies(args: Any, kwargs: Any) -> bool:
    proxies: list[fx.Proxy] = []
    fx.node.map_aggregate((args, kwargs), lambda a: proxies.append(a) if isinstance(a, fx.Proxy) else a)
    return bool(proxies)


def _is_ours(function: Callable[..., Any]) -> bool:
    return str(getattr(function, "__module__", "")).startswith("s2a_fx.")


def _leave_out_what_does_nothing(gm: fx.GraphModule) -> None:
    for node in list(gm.graph.nodes):
        call = call_of(gm, node)
        if call is not None and _is_idle(call) and not (node.op == "call_module" and has_hooks(gm.get_submodule(str(node.target)))):
            node.replace_all_uses_with(call.input)
            gm.graph.erase_node(node)


def _is_idle(call: Call) -> bool:
    """Whether a call does nothing in eval mode."""
    return call.operator is nn.Identity or (call.operator in DROPOUTS and not call.eval_options["training"])
