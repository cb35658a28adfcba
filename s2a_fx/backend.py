"""`torch.compile(model, backend="s2a")`: the passes on the graph that Dynamo hands over, then another backend.

    torch.compile(model, backend="s2a", options={"bits": 4, "inner": "inductor"})

What trains is what has `requires_grad`: freeze the model's weights, or tune it by PEFT or anything else, before it is compiled.
"""

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from s2a_fx.dynamo_graph import raised
from s2a_fx.errors import InputError
from s2a_fx.nn.recompute import Recomputed
from s2a_fx.passes import CompressActivations
from s2a_fx.recipes import COMPRESS, GraphPass

INNER = ("inductor", "aot_eager", "eager")
_OPTIONS = ("bits", "inner", "passes")


def s2a(graph_module: fx.GraphModule, example_inputs: Sequence[Any], **settings: Any) -> Callable[..., Any]:
    """The backend: keeps in a few bits what autograd would keep of Dynamo's graph, and compiles the rest by `inner`.

    Options:
        bits: of activations, norms and attention, 1 to 8; left out, 4.
        passes: a tuple of passes to apply in the place of the compression passes.
        inner: `inductor` (left out), `aot_eager` or `eager`.

    Raises:
        InputError: an option is unknown or does not fit.
    """
    options = dict(settings.get("options") or {})
    passes, inner = _passes(options), options.get("inner", "inductor")
    if inner not in INNER:
        raise InputError(f"backend s2a: got inner={inner!r}, wanted one of {', '.join(INNER)}.")
    gm, state = raised(graph_module, example_inputs)
    if torch.is_grad_enabled():
        for graph_pass in passes:
            gm = graph_pass(gm).graph_module
    for module in gm.modules():
        if isinstance(module, Recomputed):
            module.run_at_once()
    run = gm if inner == "eager" else torch.compile(_entry(gm), backend=inner, fullgraph=True)
    return lambda *arguments: run(*state.bind(gm, arguments))


def _entry(gm: fx.GraphModule) -> Callable[..., Any]:
    """A function that calls `gm`: Dynamo leaves alone the code of graph modules made while it traces, and caches by code."""

    def call(*inputs: Any) -> Any:
        return gm(*inputs)

    return types.FunctionType(call.__code__.replace(), call.__globals__, "s2a", None, call.__closure__)


def _passes(options: dict[str, Any]) -> tuple[GraphPass, ...]:
    unknown = [name for name in options if name not in _OPTIONS]
    if unknown:
        raise InputError(f"backend s2a: unknown option {', '.join(unknown)}; options are {', '.join(_OPTIONS)}.")
    if "passes" in options:
        return tuple(options["passes"])
    bits = options.get("bits", 4)
    coded = CompressActivations(activation_bits=bits, norm_bits=bits, attention_bits=bits)
    return tuple(coded if isinstance(p, CompressActivations) else p for p in COMPRESS)
