"""`transform`: a model and a recipe make a trainable module."""

from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from s2a_fx.errors import InputError
from s2a_fx.graph.capture import trace
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
    """
    passes = resolve(recipe)
    gm = trace(model, example_inputs)
    for graph_pass in passes:
        result = graph_pass(gm)
        if not hasattr(result, "graph_module"):
            raise InputError(
                f"{type(graph_pass).__name__} returned {type(result).__name__}, wanted torch.fx's PassResult; "
                "return PassResult(graph_module, modified)."
            )
        gm = result.graph_module
    note_origin(gm, model, spelled(passes))
    return gm
