"""The residual blocks of a model, found from provenance.

A module is a residual block if

1. its own forward adds to the value that it was entered with something made of that value, `x + f(x)`, where views, identities
   and the residual adds of inner modules count as x, or
2. it is of the same class as such a module (a ResNet block whose shortcut is a convolution),

and no module around it is one. A model without such modules writes its additions in the forward around them: then

3. an addition `x + f(x)` with all that lies between is a block, if the rest of the model enters it through x and leaves it through
   the sum alone, and f has a linear layer or convolution. Of two that overlap, the smaller is one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from s2a_fx.graph.calls import call_of
from s2a_fx.graph.flow import attribute, dependent_nodes, reaches
from s2a_fx.graph.layout import layout_of
from s2a_fx.graph.provenance import module_stack, owner_path


@dataclass(frozen=True)
class Block:
    """A residual block: its module path, the node it is entered with, its nodes in order, and its output node."""

    path: str
    entry: fx.Node
    nodes: tuple[fx.Node, ...]
    output: fx.Node


@dataclass(frozen=True)
class Branch:
    """What a residual block adds to its input: the block's path, the `value` that is added, and the node that adds it."""

    path: str
    value: fx.Node
    add: fx.Node


def residual_blocks(gm: fx.GraphModule) -> tuple[Block, ...]:
    """The residual blocks in the order in which they run."""
    return _blocks_and_adds(gm)[0] or _blocks_of_additions(gm)


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
    blocks, adds = _blocks_and_adds(gm)
    if not blocks:
        return tuple(Branch(b.path, _branch_of(gm, b), b.output) for b in _blocks_of_additions(gm))
    branches = []
    for block in blocks:
        own = [node for node in block.nodes if node in adds]
        branches += [Branch(block.path, next(o for o in add.all_input_nodes if o is not adds[add]), add) for add in own]
        if not own and (add := _last_add(gm, block)):
            branches.append(Branch(block.path, max(add.all_input_nodes, key=lambda o: _depth(o, block)), add))
    return tuple(branches)


def _last_add(gm: fx.GraphModule, block: Block) -> fx.Node | None:
    adds = [n for n in block.nodes if _is_add(gm, n) and len(n.all_input_nodes) == 2 and owner_path(n) == block.path]
    return adds[-1] if adds else None


def _depth(node: fx.Node, block: Block) -> int:
    """How many nodes of the block a node is computed from."""
    inside, seen, stack = set(block.nodes), set(), [node]
    while stack:
        current = stack.pop()
        if current in inside and current not in seen:
            seen.add(current)
            stack += current.all_input_nodes
    return len(seen)


def _is_add(gm: fx.GraphModule, node: fx.Node) -> bool:
    call = call_of(gm, node)
    return call is not None and call.operator is torch.add


def _blocks_and_adds(gm: fx.GraphModule) -> tuple[tuple[Block, ...], dict[fx.Node, fx.Node]]:
    """The blocks, and every residual add with the operand that is the input of what it adds to."""
    members = _members(gm)
    types = _module_types(gm)
    adds: dict[fx.Node, fx.Node] = {}
    residual: dict[str, fx.Node] = {}  # module path -> the value it adds to
    for path in sorted(members, key=lambda p: -p.count(".")):  # inner modules first: their adds show x to the outer ones
        found = _residual_adds(gm, path, members[path], adds)
        adds.update(found)
        if path and found:
            residual[path] = _origin(gm, next(iter(found.values())), adds, set(_entries(members[path])))
    kinds = {types[path] for path in residual}
    paths = [path for path in members if types.get(path) in kinds]
    blocks = []
    for path in paths:
        if any(path.startswith(outer + ".") for outer in paths):
            continue
        entries, outputs = _entries(members[path]), _outputs(members[path])
        entry = residual.get(path) or next(iter(entries), None)
        if len(outputs) == 1 and entry is not None:
            blocks.append(Block(path, entry, tuple(members[path]), outputs[0]))
    return tuple(blocks), adds


def _members(gm: fx.GraphModule) -> dict[str, list[fx.Node]]:
    members: dict[str, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        for path, kind in module_stack(node):
            if getattr(kind, "__module__", "").startswith("s2a_fx.nn"):
                break  # what passes insert, LoRA's sum say, is no block of the model's
            if not (node.op == "call_module" and path == node.target):
                members.setdefault(path, []).append(node)
    return members


def _module_types(gm: fx.GraphModule) -> dict[str, object]:
    """The types of the modules that were traced through: the graph module keeps them as empty shells, provenance knows."""
    return {path: kind for node in gm.graph.nodes for path, kind in module_stack(node)}


def _tensor_like(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _entries(nodes: list[fx.Node]) -> list[fx.Node]:
    inside = set(nodes)
    found = [
        operand
        for node in nodes
        for operand in node.all_input_nodes
        if operand not in inside and operand.op != "get_attr" and _tensor_like(operand)
    ]
    return list(dict.fromkeys(found))


def _outputs(nodes: list[fx.Node]) -> list[fx.Node]:
    inside = set(nodes)
    return [n for n in nodes if _tensor_like(n) and any(user not in inside for user in n.users)]


def _residual_adds(gm: fx.GraphModule, path: str, nodes: list[fx.Node], inner: dict[fx.Node, fx.Node]) -> dict[fx.Node, fx.Node]:
    """The adds `x + f(x)` in the module's own forward, each with its x; `inner` are those of the modules within."""
    entries = set(_entries(nodes))
    found: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        operands = node.all_input_nodes
        if not _is_add(gm, node) or owner_path(node) != path or len(operands) != 2:
            continue
        for x, other in (operands, operands[::-1]):
            if _origin(gm, x, inner | found, entries) in entries and reaches(other, entries, set(nodes)):
                found[node] = x
    return found


def _origin(gm: fx.GraphModule, node: fx.Node, adds: dict[fx.Node, fx.Node], entries: set[fx.Node]) -> fx.Node:
    """Follow identities, views and residual adds back to the value that they show, a module's entry at the farthest."""
    while node not in entries:
        if node in adds:
            node = adds[node]
            continue
        call = call_of(gm, node)
        if call is None or not (call.is_view and _has_all_elements(node, call.input)):
            break
        node = call.input
    return node


def _has_all_elements(view: fx.Node, source: fx.Node) -> bool:
    return _tensor_like(source) and view.meta["val"].numel() == source.meta["val"].numel()


def _blocks_of_additions(gm: fx.GraphModule) -> tuple[Block, ...]:
    """The blocks of rule 3."""
    order = {node: index for index, node in enumerate(gm.graph.nodes)}
    dependent = dependent_nodes(gm)
    found = []
    for node in gm.graph.nodes:
        operands = [o for o in node.all_input_nodes if o in dependent and _tensor_like(o)]
        if _is_add(gm, node) and len(operands) == 2 and (region := _region_of(gm, node, order, dependent)):
            found.append(region)
    taken: set[fx.Node] = set()
    chosen = []
    for entry, nodes in sorted(found, key=lambda region: len(region[1])):
        if taken.isdisjoint(nodes):
            taken.update(nodes)
            chosen.append((entry, nodes))
    blocks: list[Block] = []
    for entry, nodes in sorted(chosen, key=lambda region: order[region[1][-1]]):
        path = _name_of(nodes)
        count = sum(block.path == path or block.path.startswith(f"{path}_") for block in blocks)
        blocks.append(Block(f"{path}_{count}" if count else path, entry, nodes, nodes[-1]))
    return tuple(blocks)


def _region_of(
    gm: fx.GraphModule, add: fx.Node, order: dict[fx.Node, int], dependent: set[fx.Node]
) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    """The node through which alone an addition's operands come from the input, and the nodes from there to the addition."""
    inside = {add}
    frontier = _sources(add, dependent)
    while len(frontier) > 1:  # the last of them cannot be what the others come from
        last = max(frontier, key=order.__getitem__)
        if last.op == "placeholder":
            return None
        frontier.remove(last)
        inside.add(last)
        frontier |= _sources(last, dependent)
    (entry,) = frontier
    if not _tensor_like(entry) or entry.meta["val"].ndim < 3 or not any(_is_layer(gm, node) for node in inside):
        return None
    for node in sorted(dependent - inside, key=order.__getitem__, reverse=True):  # sizes that the region reads of itself
        if _is_size(node) and node.users and all(user in inside for user in node.users) and _reads(node, inside):
            inside.add(node)
    if not _shows(gm, add, entry) or any(user not in inside for node in inside - {add} for user in node.users):
        return None
    made = [
        n for n in gm.graph.nodes if n not in dependent and n.op != "get_attr" and n.users and all(u in inside for u in n.users)
    ]
    return entry, tuple(sorted({*inside, *made}, key=order.__getitem__))


def _sources(node: fx.Node, dependent: set[fx.Node]) -> set[fx.Node]:
    """What a node reads that comes from the input, sizes left out."""
    return {operand for operand in node.all_input_nodes if operand in dependent and not _is_size(operand)}


def _reads(node: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether a size is one of a value inside, at once or by way of other sizes."""
    return any(operand in inside or (_is_size(operand) and _reads(operand, inside)) for operand in node.all_input_nodes)


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), int | torch.SymInt | torch.Size)


def _shows(gm: fx.GraphModule, add: fx.Node, entry: fx.Node) -> bool:
    """Whether an operand of an addition is the entry, or a view of it; or each has a layer of its own, as a shortcut has."""
    direct = any(_origin(gm, operand, {}, {entry}) is entry for operand in add.all_input_nodes)
    return direct or all(_is_layer(gm, operand) for operand in add.all_input_nodes)


def _is_layer(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node multiplies by a matrix of parameters."""
    if node.op == "call_module" and any(p.ndim > 1 for p in gm.get_submodule(str(node.target)).parameters()):
        return True
    weights = [o for o in node.all_input_nodes if o.op == "get_attr"]
    return any(isinstance(value := attribute(gm, str(o.target)), nn.Parameter) and value.ndim > 1 for o in weights)


def _branch_of(gm: fx.GraphModule, block: Block) -> fx.Node:
    """What a block adds to its entry: the operand that does not show it, or the way through more nodes."""
    operands = block.output.all_input_nodes
    others = [o for o in operands if _origin(gm, o, {}, {block.entry}) is not block.entry]
    return max(others or operands, key=lambda o: _depth(o, block))


def _name_of(nodes: Sequence[fx.Node]) -> str:
    """The path of the innermost module around all nodes before the addition; or else the addition's own name."""
    stacks = [[path for path, _ in module_stack(n)] for n in nodes[:-1] if n.op != "get_attr" and module_stack(n)]
    common = "" if not stacks else next((path for path in reversed(stacks[0]) if all(path in stack for stack in stacks)), "")
    return common or str(nodes[-1].name)
