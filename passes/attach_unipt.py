"""Attach a light network in parallel, which reads the features of the frozen one (UniPT).

    before  head(pool(last))
    after   head(pool(ParallelNetwork(last, earlier features)))

Of tokens every block's output is read; of maps the output of every stage. No gradient flows through the frozen network, which then
keeps nothing.

Leaves alone, with a note: a stage whose map the last one's grid does not divide.
"""

from dataclasses import dataclass

from torch import fx

from s2a_fx.errors import InputError, PassError
from s2a_fx.graph.edit import free_path, splice_module
from s2a_fx.graph.layout import Layout, layout_of
from s2a_fx.graph.metadata import add_note
from s2a_fx.graph.structure import stages
from s2a_fx.nn.parallel_network import Feature, ParallelNetwork
from s2a_fx.passes.base import Pass, a_weight, building_like, require_positive
from s2a_fx.passes.pooled_feature import pooled_feature, read_instead


@dataclass(frozen=True)
class AttachUniPT(Pass):
    """Attach a `ParallelNetwork`.

    Args:
        reduction: channels of the last feature over the network's width m; must divide them.
    """

    reduction: int = 8

    def __post_init__(self) -> None:
        require_positive(self, reduction=self.reduction)

    def rewrite(self, gm: fx.GraphModule) -> bool:
        anchor, layout = pooled_feature(gm, self)
        if layout.channels % self.reduction:
            raise InputError(
                f"AttachUniPT: the last feature has {layout.channels} channels, which reduction={self.reduction} does not divide; "
                "take a reduction that does."
            )
        taps = _taps(gm, anchor, layout)
        if not taps:
            raise PassError("AttachUniPT: found no earlier feature to read: no residual block of a layout that fits the last one.")
        features = [_feature(tap) for _, tap in taps]
        with building_like(a_weight(gm)) as factory:
            network = ParallelNetwork(_feature(layout), features, layout.channels // self.reduction, **factory)
        readers = list(anchor.users)
        args = (anchor, *(node for node, _ in taps))
        made = splice_module(gm, free_path(gm, "", "parallel_network"), network, args, before=anchor.next)
        read_instead(gm, anchor, readers, made, self)
        return True


def _taps(gm: fx.GraphModule, anchor: fx.Node, last: Layout) -> list[tuple[fx.Node, Layout]]:
    """The features before the anchor, each with its layout."""
    outputs = [block.output for stage in stages(gm) for block in (stage if last.order == "BNC" else stage[-1:])]
    found = []
    for node in outputs:
        layout = layout_of(gm, node)
        if node is anchor or node > anchor:
            continue
        if layout is None or not _fits(layout, last):
            add_note(gm, "AttachUniPT", node.name, "its positions are not a multiple of the last feature's")
            continue
        found.append((node, layout))
    return found


def _fits(tap: Layout, last: Layout) -> bool:
    if (tap.order == "BNC") != (last.order == "BNC"):
        return False
    if tap.order == "BNC":
        return tap.tokens == last.tokens
    return tap.height % last.height == 0 and tap.width % last.width == 0


def _feature(layout: Layout) -> Feature:
    return Feature(layout.order, layout.channels, (layout.height, layout.width))
