"""Attach a side network of the model's own structure, r times narrower, that climbs beside it (LST).

    before  x_i = block_i(x_{i-1});  head(pool(last))
    after   y_i = layer_i(g_i y_{i-1} + (1 - g_i) down(x_i));  head(pool(up(norm(y_n))))

No gradient flows through the frozen network, which then keeps nothing. Where stages change resolution or width, a convolution
carries y along.

Leaves alone, with a note: a block whose output is laid out otherwise than the last feature.
"""

from dataclasses import dataclass

from torch import fx

from s2a_fx.errors import InputError, PassError
from s2a_fx.graph.edit import splice_module
from s2a_fx.graph.layout import Layout, layout_of
from s2a_fx.graph.metadata import add_note
from s2a_fx.graph.structure import Block, residual_blocks
from s2a_fx.nn.ladder import LadderLayer, LadderStart, LadderTop
from s2a_fx.nn.lite_side_branch import SideTransition
from s2a_fx.passes.base import Pass, a_weight, building_like, require_positive
from s2a_fx.passes.pooled_feature import pooled_feature, read_instead


@dataclass(frozen=True)
class AttachLadder(Pass):
    """Attach a ladder of a `LadderLayer` a block.

    Args:
        reduction: r, by which the side network is narrower; must divide the channels of every block. The authors take 8.
    """

    reduction: int = 8

    def __post_init__(self) -> None:
        require_positive(self, reduction=self.reduction)

    def rewrite(self, gm: fx.GraphModule) -> bool:
        if any(name == "ladder" for name, _ in gm.named_children()):
            raise PassError("AttachLadder: the model has a ladder already; apply the pass once.")
        last, layout = pooled_feature(gm, self)
        rungs = self._rungs(gm, last, layout)
        if len(rungs) < 2:
            raise PassError("AttachLadder: found no residual block laid out like the last feature; take another recipe.")
        readers = list(last.users)
        with building_like(a_weight(gm)) as factory:
            start = LadderStart(rungs[0][1].order, rungs[0][1].channels, rungs[0][1].channels // self.reduction, **factory)
            side = splice_module(gm, "ladder.start", start, (rungs[0][0],), before=rungs[0][0].next)
            before = rungs[0][1]
            for index, (node, here) in enumerate(rungs[1:]):
                width = here.channels // self.reduction
                if (before.channels, before.height, before.width) != (here.channels, here.height, here.width):
                    sizes = (before.height, before.width), (here.height, here.width)
                    transition = SideTransition((before.channels // self.reduction, width), *sizes, **factory)
                    side = splice_module(gm, f"ladder.transition{index}", transition, (side,), before=max(side, node).next)
                layer = LadderLayer(here.order, here.channels, width, **factory)
                side = splice_module(gm, f"ladder.layer{index}", layer, (side, node), before=max(side, node).next)
                before = here
            top = LadderTop(layout.order, before.channels // self.reduction, layout.channels, **factory)
        made = splice_module(gm, "ladder.top", top, (side,), before=max(side, last).next)
        read_instead(gm, last, readers, made, self)
        return True

    def _rungs(self, gm: fx.GraphModule, last: fx.Node, layout: Layout) -> list[tuple[fx.Node, Layout]]:
        """The first block's input and every block's output, each with its layout."""
        blocks: tuple[Block, ...] = residual_blocks(gm)
        nodes = [blocks[0].entry, *(block.output for block in blocks)] if blocks else []
        rungs = []
        for node in nodes:
            found = layout_of(gm, node)
            if node > last:
                continue
            if found is None or not _alike(found, layout):
                add_note(gm, "AttachLadder", node.name, "laid out otherwise than the last feature")
                continue
            if found.channels % self.reduction:
                raise InputError(
                    f"AttachLadder: {node.name} has {found.channels} channels, which reduction={self.reduction} does not divide; "
                    "take a reduction that does."
                )
            rungs.append((node, found))
        return rungs


def _alike(rung: Layout, last: Layout) -> bool:
    """Whether a side layer can carry on from one to the other: both maps, or both as many tokens."""
    if "BNC" in (rung.order, last.order):
        return rung.order == last.order and rung.tokens == last.tokens
    return True
