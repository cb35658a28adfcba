"""The residual blocks of a model: what stands between a value x and a sum `x + f(x)`.

Blocks are made of residual additions, which the data flow tells (`additions.py`). Modules only say which additions belong together
(`module_blocks.py`); additions outside of such modules, in a parent's loop say, are blocks by themselves (`inline_blocks.py`). A
block is entered through one value, `entry`; what else it reads (a mask, the tokens that a class token asks) may come from anywhere.
"""

from collections.abc import Iterator

from torch import fx

from s2a_fx.graph.additions import DataFlow, residual_additions, summands
from s2a_fx.graph.blocks import Block, Branch
from s2a_fx.graph.inline_blocks import inline_blocks
from s2a_fx.graph.layout import layout_of
from s2a_fx.graph.module_blocks import is_inserted, module_blocks
from s2a_fx.graph.provenance import owner_path

__all__ = ["Block", "Branch", "residual_blocks", "residual_branches", "stages"]


def residual_blocks(gm: fx.GraphModule) -> tuple[Block, ...]:
    """The residual blocks in the order in which they run."""
    return tuple(_blocks_and_sums(gm))


def stages(gm: fx.GraphModule) -> tuple[tuple[Block, ...], ...]:
    """The residual blocks, those in a row together whose outputs have the same channels and positions."""
    found: list[list[Block]] = []
    before: object = None
    for block in residual_blocks(gm):
        layout = layout_of(gm, block.output)
        if not found or layout != before:
            found.append([])
        found[-1].append(block)
        before = layout
    return tuple(map(tuple, found))


def residual_branches(gm: fx.GraphModule) -> tuple[Branch, ...]:
    """The branches of the residual blocks in the order in which they run, those of attention and MLP one by one.

    Where a shortcut has layers, too, the branch is the way through more nodes.
    """
    return tuple(branch for block, sums in _blocks_and_sums(gm).items() for branch in _branches(gm, block, sums))


def _blocks_and_sums(gm: fx.GraphModule) -> dict[Block, dict[fx.Node, fx.Node]]:
    """The blocks in order, each with its residual additions and what they add."""
    flow = DataFlow(gm)
    additions = {node: addition for node, addition in residual_additions(flow).items() if not is_inserted(node)}
    modules = module_blocks(flow, additions)
    found = [*modules, *((block, [block.output]) for block in inline_blocks(flow, additions, [block for block, _ in modules]))]
    found.sort(key=lambda pair: flow.order[pair[0].output])
    return {block: {node: additions[node].branch for node in own if node in additions} for block, own in found}


def _branches(gm: fx.GraphModule, block: Block, sums: dict[fx.Node, fx.Node]) -> Iterator[Branch]:
    yield from (Branch(block.path, value, add) for add, value in sums.items())
    if not sums and (last := _last_sum(gm, block)):
        yield Branch(block.path, max(last.all_input_nodes, key=lambda operand: _depth(operand, block)), last)


def _last_sum(gm: fx.GraphModule, block: Block) -> fx.Node | None:
    sums = [n for n in block.nodes if summands(gm, n) and (owner_path(n) == block.path or n is block.output)]
    return sums[-1] if sums else None


def _depth(node: fx.Node, block: Block) -> int:
    """How many nodes of the block a node is computed from."""
    inside, seen, stack = set(block.nodes), set(), [node]
    while stack:
        current = stack.pop()
        if current in inside and current not in seen:
            seen.add(current)
            stack += current.all_input_nodes
    return len(seen)
