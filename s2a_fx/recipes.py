"""Recipes: named tuples of passes, applied left to right. A user's own recipe is a tuple like these."""

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from s2a_fx.errors import InputError
from s2a_fx.passes import (
    AttachLadder,
    AttachSideBranch,
    AttachUniPT,
    CheckpointBlocks,
    CompressActivations,
    FreezeWeights,
    FuseAttention,
    InsertAdapter,
    InsertLoRA,
    InsertLowRankPrompt,
    InsertVisualPrompt,
    QuantizeNonParametric,
    RecomputeBranches,
)

GraphPass = Callable[[fx.GraphModule], PassResult]

FULL: tuple[GraphPass, ...] = ()
LINEAR = (FreezeWeights(keep=("head",)),)
BIAS = (FreezeWeights(keep=("bias", "head")),)
LORA = (*LINEAR, InsertLoRA(rank=48))
ADAPTER = (*LINEAR, InsertAdapter(reduction=8))
VPT = (*LINEAR, InsertVisualPrompt(tokens=50))
UNIPT = (*LINEAR, AttachUniPT(reduction=8))
LST = (*LINEAR, AttachLadder(reduction=8))
BIAS_LRP = (*BIAS, InsertLowRankPrompt(rank=30))
BIAS_LRP_LSB = (*BIAS_LRP, AttachSideBranch(reduction=8))
S2A_PAPER = (*BIAS_LRP_LSB, QuantizeNonParametric(bits=4))

COMPRESS = (
    FuseAttention(),
    RecomputeBranches(bits=6, widest=256),  # narrow layers have the most to keep, and the least to recompute
    CompressActivations(),
)
COMPRESS_MAX = (FuseAttention(), RecomputeBranches(bits=4, group=64), CompressActivations())
CHECKPOINT = (CheckpointBlocks(),)

RECIPES: dict[str, tuple[GraphPass, ...]] = {
    "full": FULL,
    "linear": LINEAR,
    "bias": BIAS,
    "lora": LORA,
    "adapter": ADAPTER,
    "vpt": VPT,
    "unipt": UNIPT,
    "lst": LST,
    "bias+lrp": BIAS_LRP,
    "bias+lrp+lsb": BIAS_LRP_LSB,
    "s2a-paper": S2A_PAPER,
    "s2a": (*BIAS_LRP_LSB, *COMPRESS),
    "s2a-max": (*BIAS_LRP_LSB, *COMPRESS_MAX),
}

SUFFIXES: dict[str, tuple[GraphPass, ...]] = {"compress": COMPRESS, "compress-max": COMPRESS_MAX, "checkpoint": CHECKPOINT}
"""What keeps less of any recipe: `lora+compress`, `bias+checkpoint`."""


def resolve(recipe: str | Sequence[GraphPass]) -> tuple[GraphPass, ...]:
    """The passes of a recipe given by name, with or without one of `SUFFIXES`, or as a sequence of passes.

    Raises:
        InputError: no recipe has this name, or an element is not callable.
    """
    if isinstance(recipe, str):
        base, _, suffix = recipe.rpartition("+")
        if recipe not in RECIPES and base in RECIPES and suffix in SUFFIXES:
            return (*RECIPES[base], *SUFFIXES[suffix])
        if recipe not in RECIPES:
            known = [*RECIPES, *(f"{name}+{ending}" for name in RECIPES for ending in SUFFIXES)]
            near = get_close_matches(recipe, known, n=2, cutoff=0.4)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            endings = ", ".join(f"+{name}" for name in SUFFIXES)
            raise InputError(f"unknown recipe {recipe!r}; recipes are {', '.join(RECIPES)}, with or without {endings}.{hint}")
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


def spelled(passes: Sequence[GraphPass]) -> tuple[str, ...]:
    """Each pass with all its options, so that two recipes are alike if these are; functions among them count by their names."""
    return tuple(_spelled(p) for p in passes)


def _spelled(graph_pass: GraphPass) -> str:
    if not is_dataclass(graph_pass):
        return _pass_name(graph_pass)
    options = [(f.name, getattr(graph_pass, f.name)) for f in fields(graph_pass)]
    return f"{type(graph_pass).__name__}({', '.join(f'{name}={_option(value)}' for name, value in options)})"


def _option(value: object) -> str:
    return getattr(value, "__qualname__", "") or repr(value)  # a function's repr has its address


def recipe_called(passes: Sequence[str]) -> str:
    """The name of the recipe of these passes, as `spelled` has them, or the passes themselves joined by ` + `."""
    names = [*RECIPES, *(f"{name}+{ending}" for name in RECIPES for ending in SUFFIXES)]
    return next((name for name in names if spelled(resolve(name)) == tuple(passes)), " + ".join(passes))
