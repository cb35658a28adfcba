"""Add a Low-Rank Prompt to the features that enter each residual block (paper, eq. 3).

    before  block(x)
    after   block(x + A B)      keeps nothing: the gradients of A and B need no activation, eq. (4)

Leaves alone: a block whose input is neither tokens nor a map with known channels.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from s2a_fx.errors import InputError, PassError
from s2a_fx.graph.edit import free_path, insert_call
from s2a_fx.graph.layout import layout_of
from s2a_fx.graph.metadata import add_note
from s2a_fx.graph.provenance import owner_path
from s2a_fx.graph.structure import Block, residual_blocks, stages
from s2a_fx.nn.low_rank_prompt import LowRankPrompt
from s2a_fx.passes.base import Pass, a_weight, building_like, require_not_negative, require_positive


@dataclass(frozen=True)
class InsertLowRankPrompt(Pass):
    """Insert a `LowRankPrompt` before each residual block, or after the nodes that `where` picks.

    Args:
        rank: r of eq. (3); the paper takes 30.
        where: None for the residual blocks, or a predicate over nodes: the prompt is added to the value of each node for which
            it is true. Any predicate, for example `lambda node: node.name.endswith("attn_proj")`.
        std: of B's entries at the start; A's are 0.
        skip: how many stages at the beginning go without.
        cells: cut maps into so many cells in height and in width, whose positions share a row of A; 0 for a row a position.
    """

    rank: int = 30
    where: Callable[[fx.Node], bool] | None = None
    std: float = 0.02
    skip: int = 0
    cells: int = 0

    def __post_init__(self) -> None:
        require_positive(self, rank=self.rank)
        require_not_negative(self, skip=self.skip, cells=self.cells)

    def rewrite(self, gm: fx.GraphModule) -> bool:
        if self.where is None:
            places = _block_entries(gm, self.skip)
        else:
            places = [(owner_path(node), node, list(node.users)) for node in gm.graph.nodes if self.where(node)]
        if not places:
            raise PassError(
                "InsertLowRankPrompt: found no residual block (nothing is added to what it is computed from); "
                "say where=, or take a recipe without prompts, such as bias"
                if self.where is None
                else "InsertLowRankPrompt: the predicate `where` is true for no node; print(gm.graph) shows them"
            )
        inserted = [self._insert(gm, *place) for place in places]
        return any(inserted)

    def _insert(self, gm: fx.GraphModule, parent: str, node: fx.Node, readers: list[fx.Node]) -> bool:
        layout = layout_of(gm, node)
        if layout is None or not readers:
            add_note(gm, "InsertLowRankPrompt", node.name, f"{parent}: neither tokens nor a map with known channels")
            return False
        grid = (layout.tokens,) if layout.order == "BNC" else (layout.height, layout.width)
        cells = (self.cells, self.cells) if self.cells and layout.order != "BNC" else None
        if cells and (layout.height % self.cells or layout.width % self.cells):
            raise InputError(
                f"InsertLowRankPrompt: {parent} has a map of {layout.height}x{layout.width}, which cells={self.cells} does not "
                "divide; take a number that does, or 0."
            )
        with building_like(a_weight(gm)) as factory:
            prompt = LowRankPrompt(parent, layout.order, grid, layout.channels, self.rank, self.std, cells, **factory)
        with gm.graph.inserting_before(min(readers)):
            path = free_path(gm, parent, "low_rank_prompt")
            call = insert_call(gm, path, prompt, (node,), like=node if self.where else None)  # before a block: outside of all
        call.meta["val"] = node.meta["val"]
        for reader in readers:
            reader.replace_input_with(node, call)
        return True


def _block_entries(gm: fx.GraphModule, skip: int) -> list[tuple[str, fx.Node, list[fx.Node]]]:
    blocks = [block for stage in stages(gm)[skip:] for block in stage] if skip else residual_blocks(gm)
    return [(block.path, block.entry, _readers(block)) for block in blocks]


def _readers(block: Block) -> list[fx.Node]:
    inside = set(block.nodes)
    return [user for user in block.entry.users if user in inside]
