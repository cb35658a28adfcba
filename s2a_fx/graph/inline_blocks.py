"""Residual blocks that are no modules: additions in a parent's loop, each with what lies between x and the sum.

Such a block has a layer, and the rest of the model reads nothing of it but the sum. Of nested ones the outer is a block, unless it
contains others one after another, as the long shortcut of a U-Net does. If a model has blocks of this kind only, a sum of two
branches with layers of their own is one, too: a shortcut with a convolution.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from s2a_fx.graph.additions import Addition, DataFlow, common_beginning, is_tensor, summands
from s2a_fx.graph.blocks import Block
from s2a_fx.graph.module_blocks import is_inserted
from s2a_fx.graph.provenance import owner_path


@dataclass(frozen=True)
class _Region:
    """An addition and the nodes from its entry to it."""

    add: fx.Node
    entry: fx.Node
    nodes: frozenset[fx.Node]


def inline_blocks(flow: DataFlow, additions: Mapping[fx.Node, Addition], modules: Sequence[Block]) -> list[Block]:
    """The blocks outside of `modules`, those that are modules."""
    taken = {node for block in modules for node in block.nodes}
    outside = [a for a in additions.values() if taken.isdisjoint(a.nodes)]
    regions = [region for a in outside if (region := _closed(flow, a.entry, a.node))]
    if regions and not modules:
        regions += _shortcuts_with_layers(flow, additions)
    names = {block.path for block in modules}
    blocks = []
    for region in sorted(_not_nested(regions), key=lambda region: flow.order[region.add]):
        nodes = tuple(sorted(region.nodes, key=flow.order.__getitem__))
        name = _free_name(nodes, region.add, names)
        names.add(name)
        blocks.append(Block(name, region.entry, nodes, region.add))
    return blocks


def _shortcuts_with_layers(flow: DataFlow, additions: Mapping[fx.Node, Addition]) -> Iterator[_Region]:
    for node in flow.gm.graph.nodes:
        own = node in flow.dependent and node not in additions and not is_inserted(node)
        operands = summands(flow.gm, node) if own else None
        if operands and all(map(flow.is_layer, operands)) and (entry := flow.dominator(node)) is not None:
            maps = all(is_tensor(value) and value.meta["val"].ndim > 2 for value in (entry, node))
            if maps and (region := _closed(flow, entry, node)):
                yield region


def _closed(flow: DataFlow, entry: fx.Node, add: fx.Node) -> _Region | None:
    """What lies between an entry and an addition, with the sizes and parameters made for it; None if it is read elsewhere."""
    inside = flow.between(entry, add)
    if not any(map(flow.is_layer, inside)):
        return None
    inside.update(_made_for(flow, inside, entry))
    read_elsewhere = any(user not in inside for node in inside if node is not add for user in node.users)
    return None if read_elsewhere else _Region(add, entry, frozenset(inside))


def _made_for(flow: DataFlow, inside: set[fx.Node], entry: fx.Node) -> list[fx.Node]:
    """Sizes of values inside or of the entry, and what is made of parameters, that these nodes alone read."""
    found: set[fx.Node] = set()
    stack = [o for node in inside for o in node.all_input_nodes]
    while stack:
        node = stack.pop()
        helps = node not in flow.dependent and node.op not in ("get_attr", "placeholder") and node not in inside | found
        if helps and all(user in inside or user in found for user in node.users):
            found.add(node)
            stack += node.all_input_nodes
    known = {*inside, entry}

    def reads_only_known(node: fx.Node) -> bool:
        return all(o in known or (o not in flow.dependent and reads_only_known(o)) for o in node.all_input_nodes)

    return [node for node in found if reads_only_known(node)]


def _not_nested(regions: Sequence[_Region]) -> list[_Region]:
    """Of nested regions the outer ones, unless they contain several in a row."""
    found: list[_Region] = []
    for region in sorted(regions, key=lambda r: -len(r.nodes)):
        inner = [r for r in regions if r.nodes < region.nodes]
        apart = any(a.nodes.isdisjoint(b.nodes) for a in inner for b in inner)
        if not apart and all(region.nodes.isdisjoint(other.nodes) for other in found):
            found.append(region)
    return found


def _free_name(nodes: Sequence[fx.Node], add: fx.Node, taken: Iterable[str]) -> str:
    """The path that the modules called between have in common, or else the addition's name; with a number if taken."""
    places = [str(node.target) if node.op == "call_module" else owner_path(node) for node in nodes]
    within = [place.split(".") for place in places if place != owner_path(add)]
    wanted = name = ".".join(common_beginning(within)) or str(add.name)
    count = 1
    while name in taken:
        name, count = f"{wanted}_{count}", count + 1
    return name
