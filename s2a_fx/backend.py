"""`torch.compile(model, backend="s2a")`: the passes on the graph that Dynamo hands over, then another backend.

    torch.compile(model, backend="s2a", options={"bits": 4, "inner": "inductor"})

What trains is what has `requires_grad`: freeze the model's weights, or tune it by PEFT or anything else, before it is compiled.
"""

import copy
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from s2a_fx.errors import InputError
from s2a_fx.graph import torch_internals
from s2a_fx.graph.dynamo_modules import State, UnsupportedGraph, to_modules
from s2a_fx.nn.recompute import Recomputed
from s2a_fx.passes import CompressActivations
from s2a_fx.recipes import COMPRESS, GraphPass, resolve

INNER = ("inductor", "aot_eager", "eager")
_OPTIONS = ("bits", "inner", "passes")


def s2a(graph_module: fx.GraphModule, example_inputs: Sequence[Any], **settings: Any) -> Callable[..., Any]:
    """The backend: keeps in a few bits what autograd would keep of Dynamo's graph, and compiles the rest by `inner`.

    A graph that writes in place to what is read under another name (a view, an input) goes to `inner` as it is, with a warning:
    what the passes move must not depend on the order of writes.

    Options:
        bits: of activations, norms and attention, 1 to 8; left out, 4. Narrow branches are recomputed from 6 bits of their norm.
        passes: a tuple of passes, or a recipe's name, in the place of the compression passes.
        inner: `inductor` (left out), `aot_eager` or `eager`.
        mode: torch.compile's own `mode`, for `inductor`.

    Raises:
        InputError: an option is unknown or does not fit.
    """
    options = dict(settings.pop("options", None) or {})
    mode = settings.pop("mode", None)
    passes, inner = _passes(options), options.get("inner", "inductor")
    if inner not in INNER or settings or (mode and inner != "inductor"):
        got = ", ".join(f"{k}={v!r}" for k, v in {"inner": inner, "mode": mode, **settings}.items() if v)
        raise InputError(f"backend s2a: got {got}, wanted inner to be one of {', '.join(INNER)}, and mode with inductor alone.")
    try:
        gm, state = to_modules(graph_module, example_inputs)
    except UnsupportedGraph as reason:
        warnings.warn(f"backend s2a: {reason}; this graph is compiled as it is, and keeps what autograd keeps.", stacklevel=2)
        return torch_internals.backend_named(inner)(graph_module, list(example_inputs))
    if torch.is_grad_enabled():
        for graph_pass in passes:
            gm = graph_pass(gm).graph_module
    for module in gm.modules():
        if isinstance(module, Recomputed):
            module.run_at_once()
    if inner == "eager":
        return _by_model(gm, state)
    run = torch.compile(_entry(gm), backend=inner, fullgraph=True, mode=mode)
    return lambda *arguments: run(*state.bind(gm, arguments))


def _by_model(gm: fx.GraphModule, state: State) -> Callable[..., Any]:
    """A copy of `gm` for each set of parameters: what is computed again in the backward must find those of its forward.

    Dynamo calls one graph for all blocks of a model that are compiled one by one.
    """
    copies: dict[tuple[int, ...], fx.GraphModule] = {}

    def call(*arguments: Any) -> Any:
        key = tuple(id(arguments[position]) for position, _ in state.attributes)
        if key not in copies:
            state.bind(gm, arguments)
            copies[key] = copy.deepcopy(gm, {id(t): t for t in [*gm.parameters(), *gm.buffers()]})
        return copies[key](*state.bind(copies[key], arguments))

    return call


def _entry(gm: fx.GraphModule) -> Callable[..., Any]:
    """A function that calls `gm`: Dynamo leaves alone the code of graph modules made while it traces, and caches by code."""

    def call(*inputs: Any) -> Any:
        return gm(*inputs)

    return types.FunctionType(call.__code__.replace(), call.__globals__, "s2a", None, call.__closure__)


def _passes(options: dict[str, Any]) -> tuple[GraphPass, ...]:
    unknown = [name for name in options if name not in _OPTIONS]
    if unknown:
        raise InputError(f"backend s2a: unknown option {', '.join(unknown)}; options are {', '.join(_OPTIONS)}.")
    if "passes" in options and "bits" in options:
        raise InputError("backend s2a: got bits and passes; give the bits to the passes.")
    if "passes" in options:
        return resolve(options["passes"])
    bits = options.get("bits", 4)
    coded = CompressActivations(activation_bits=bits, norm_bits=bits, attention_bits=bits)
    return tuple(coded if isinstance(p, CompressActivations) else p for p in COMPRESS)
