"""Recipes: named tuples of passes, applied left to right. A user's own recipe is a tuple like these."""

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from s2a_fx.errors import InputError
from s2a_fx.passes import (
    AttachSideBranch,
    CompressActivations,
    FreezeWeights,
    FuseAttention,
    InsertLowRankPrompt,
    QuantizeNonParametric,
    RecomputeBranches,
)

GraphPass = Callable[[fx.GraphModule], PassResult]

FULL: tuple[GraphPass, ...] = ()
LINEAR = (FreezeWeights(keep=("head",)),)
BIAS = (FreezeWeights(keep=("bias", "head")),)
BIAS_LRP = (*BIAS, InsertLowRankPrompt(rank=30))
BIAS_LRP_LSB = (*BIAS_LRP, AttachSideBranch(reduction=8))
S2A_PAPER = (*BIAS_LRP_LSB, QuantizeNonParametric(bits=4))
S2A = (
    *BIAS_LRP_LSB,
    FuseAttention(),
    RecomputeBranches(bits=6, widest=256),  # narrow layers have the most to keep, and the least to recompute
    CompressActivations(),
)
S2A_MAX = (*BIAS_LRP_LSB, FuseAttention(), RecomputeBranches(bits=4, group=64), CompressActivations())

RECIPES: dict[str, tuple[GraphPass, ...]] = {
    "full": FULL,
    "linear": LINEAR,
    "bias": BIAS,
    "bias+lrp": BIAS_LRP,
    "bias+lrp+lsb": BIAS_LRP_LSB,
    "s2a-paper": S2A_PAPER,
    "s2a": S2A,
    "s2a-max": S2A_MAX,
}


def resolve(recipe: str | Sequence[GraphPass]) -> tuple[GraphPass, ...]:
    """The passes of a recipe given by name or as a sequence of passes.

    Raises:
        InputError: no recipe has this name, or an element is not callable.
    """
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            near = get_close_matches(recipe, RECIPES, n=2, cutoff=0.4)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise InputError(f"unknown recipe {recipe!r}; recipes are {', '.join(RECIPES)}.{hint}")
        return RECIPES[recipe]
    wrong = [type(p).__name__ for p in recipe if not callable(p) or isinstance(p, type)]
    if wrong:
        raise InputError(f"recipe: got {', '.join(wrong)}, wanted pass objects such as FreezeWeights(); give a name or a tuple.")
    return tuple(recipe)


def name_of(recipe: str | Sequence[GraphPass]) -> str:
    """A recipe's name, or its passes with the options that are not their defaults, joined by ` + `."""
    return recipe if isinstance(recipe, str) else " + ".join(_pass_name(p) for p in recipe) or "full"


def _pass_name(graph_pass: GraphPass) -> str:
    if not is_dataclass(graph_pass):
        return getattr(graph_pass, "__name__", type(graph_pass).__name__)
    options = [(f.name, getattr(graph_pass, f.name)) for f in fields(graph_pass) if getattr(graph_pass, f.name) != f.default]
    return f"{type(graph_pass).__name__}({', '.join(f'{name}={value!r}' for name, value in options)})"
