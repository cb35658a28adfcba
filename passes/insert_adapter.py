"""Insert bottleneck adapters at the ends of residual branches (Houlsby et al.; the paper's eq. 13).

    before  x + branch(x)
    after   x + adapter(branch(x)), adapter(h) = h + up(gelu(down(h)))      keeps h and both narrow tensors

The authors also train the layer norms, and start near 0, not at it.

Leaves alone, with a note: a branch that is neither tokens nor a map with known channels.
"""

from dataclasses import dataclass

from timm.layers.drop import drop_path
from torch import fx, nn

from s2a_fx.errors import InputError, PassError
from s2a_fx.graph.calls import operator_of
from s2a_fx.graph.edit import free_path, splice_module
from s2a_fx.graph.layout import Layout, layout_of
from s2a_fx.graph.metadata import add_note
from s2a_fx.graph.structure import Branch, residual_branches
from s2a_fx.nn.adapter import Adapter
from s2a_fx.passes.base import Pass, a_weight, building_like, require_positive


@dataclass(frozen=True)
class InsertAdapter(Pass):
    """Insert an `Adapter` at the end of each residual branch.

    Args:
        reduction: channels of the branch over channels of the bottleneck; must divide them.
        last: only at the end of each block's last branch: after the MLP of a transformer's block.
    """

    reduction: int = 8
    last: bool = False

    def __post_init__(self) -> None:
        require_positive(self, reduction=self.reduction)

    def rewrite(self, gm: fx.GraphModule) -> bool:
        branches = residual_branches(gm)
        if not branches:
            raise PassError(
                "InsertAdapter: found no residual block (nothing is added to what it is computed from); take another recipe."
            )
        if self.last:
            branches = tuple({branch.path: branch for branch in branches}.values())
        places = [place for branch in branches if (place := self._place(gm, branch))]
        for place in places:
            self._insert(gm, *place)
        return bool(places)

    def _place(self, gm: fx.GraphModule, branch: Branch) -> tuple[Branch, fx.Node, fx.Node, Layout] | None:
        value, reader = _before_drop_path(gm, branch)
        layout = layout_of(gm, value)
        if layout is None:
            add_note(gm, "InsertAdapter", value.name, f"{branch.path}: neither tokens nor a map with known channels")
            return None
        if layout.channels % self.reduction:
            raise InputError(
                f"InsertAdapter: {branch.path} has {layout.channels} channels, which reduction={self.reduction} does not divide; "
                "take a reduction that does."
            )
        return branch, value, reader, layout

    def _insert(self, gm: fx.GraphModule, branch: Branch, value: fx.Node, reader: fx.Node, layout: Layout) -> None:
        with building_like(a_weight(gm)) as factory:
            adapter = Adapter(layout.channels, layout.channels // self.reduction, layout.order == "BCHW", **factory)
        adapted = splice_module(gm, free_path(gm, branch.path, "adapter"), adapter, (value,), before=value.next, like=branch.add)
        adapted.meta["val"] = value.meta["val"]
        reader.replace_input_with(value, adapted)


def _before_drop_path(gm: fx.GraphModule, branch: Branch) -> tuple[fx.Node, fx.Node]:
    """The branch's value before what drops it as a whole, and its reader."""
    value, reader = branch.value, branch.add
    while operator_of(gm, value) in (nn.Identity, drop_path):
        value, reader = value.all_input_nodes[0], value
    return value, reader
