"""`transform`: a model and a recipe make a trainable module."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import fx, nn

from s2a_fx.errors import InputError
from s2a_fx.graph.capture import trace
from s2a_fx.graph.given_model import accept_model
from s2a_fx.graph.torch_internals import neutral_state
from s2a_fx.recipes import GraphPass, resolve, spelled
from s2a_fx.tasks.origin import note_origin


@neutral_state()
def transform(
    model: nn.Module,
    example_inputs: Any,
    recipe: str | Sequence[GraphPass] = "s2a",
) -> fx.GraphModule:
    """Trace `model` and apply the passes of `recipe`.

    Args:
        model: any traceable module. It is left as it is, `requires_grad` and mode included; the result shares the storages of
            its weights, so that training the result changes the values that both see.
        example_inputs: what the model is called with, of the size that it will train on: a tensor, a tuple of positional arguments,
            a dict of keyword arguments, or `s2a_fx.Inputs(*args, **kwargs)`. Arguments are pytrees of tensors and constants.
        recipe: a name (see `s2a_fx.RECIPES`) or a sequence of passes.

    Returns:
        An ordinary module: it trains in eager mode, is copied, pickled and saved by `state_dict` like any other.

    Raises:
        S2AError: the recipe, the inputs or the model do not fit; the message says what to do.

    The random state is afterwards as before.
    """
    passes = resolve(recipe)
    model = accept_model(model)
    gm = trace(model, example_inputs)
    with _same_random_state(gm):
        gm = _apply(passes, gm)
    note_origin(gm, model, spelled(passes))
    return gm


def _apply(passes: Sequence[GraphPass], gm: fx.GraphModule) -> fx.GraphModule:
    for graph_pass in passes:
        result = graph_pass(gm)
        if not hasattr(result, "graph_module"):
            raise InputError(
                f"{type(graph_pass).__name__} returned {type(result).__name__}, wanted torch.fx's PassResult; "
                "return PassResult(graph_module, modified)."
            )
        gm = result.graph_module
    return gm


@contextmanager
def _same_random_state(gm: fx.GraphModule) -> Iterator[None]:
    """Leave the generators of the CPU and of the model's devices as they were: new parameters are drawn from them."""
    places = {t.device for t in [*gm.parameters(), *gm.buffers()]}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind in ("cuda", "xpu"):
            if used := sorted(place.index for place in places if place.type == kind):
                stack.enter_context(torch.random.fork_rng(devices=used, device_type=kind))
        yield
