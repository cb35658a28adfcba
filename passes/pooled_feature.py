"""The feature that a model pools for its head, and something put in its place: what side networks have in common."""

from torch import fx

from s2a_fx.errors import PassError
from s2a_fx.graph.heads import last_feature
from s2a_fx.graph.layout import Layout, layout_of
from s2a_fx.graph.shapes import propagate
from s2a_fx.passes.base import Pass


def pooled_feature(gm: fx.GraphModule, source: Pass) -> tuple[fx.Node, Layout]:
    """The last feature and its layout.

    Raises:
        PassError: the model has no head over one feature that is pooled by a mean or a token.
    """
    node = last_feature(gm)
    layout = layout_of(gm, node) if node is not None else None
    if node is None or layout is None:
        raise PassError(
            f"{type(source).__name__}: found no classification head over one pooled feature; build the model with num_classes > 0, "
            "or take another recipe if it pools otherwise than by a mean or a token."
        )
    return node, layout


def read_instead(gm: fx.GraphModule, feature: fx.Node, readers: list[fx.Node], made: fx.Node, source: Pass) -> None:
    """Let the feature's `readers` read what was `made` of it."""
    propagate(gm)
    wanted, got = tuple(feature.meta["val"].shape), tuple(made.meta["val"].shape)
    if wanted != got:
        raise PassError(f"{type(source).__name__}: the head reads {wanted}, the side network makes {got}; take another recipe.")
    for reader in readers:
        reader.replace_input_with(feature, made)
