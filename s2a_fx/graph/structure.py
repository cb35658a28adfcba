"""The residual blocks of a model, found from provenance.

A module is a residual block if

1. its own forward adds to the value that it was entered with something made of that value, `x + f(x)`, where views, identities
   and the residual adds of inner modules count as x, or
2. it is of the same class as such a module (a ResNet block whose shortcut is a convolution),

and no module around it is one.
"""

import operator
from dataclasses import dataclass

import torch
from torch import fx, nn

from s2a_fx.graph.flow import reaches
from s2a_fx.graph.layout import layout_of
from s2a_fx.graph.provenance import module_stack, owner_path

_ADDS = (operator.add, operator.iadd, torch.add)
_VIEW_METHODS = ("view", "reshape", "contiguous", "permute", "transpose", "flatten")


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
    return _blocks_and_adds(gm)[0]


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
    branches = []
    for block in blocks:
        own = [node for node in block.nodes if node in adds]
        branches += [Branch(block.path, next(o for o in add.all_input_nodes if o is not adds[add]), add) for add in own]
        if not own and (add := _last_add(block)):
            branches.append(Branch(block.path, max(add.all_input_nodes, key=lambda o: _depth(o, block)), add))
    return tuple(branches)


def _last_add(block: Block) -> fx.Node | None:
    adds = [n for n in block.nodes if _is_add(n) and len(n.all_input_nodes) == 2 and owner_path(n) == block.path]
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


def _is_add(node: fx.Node) -> bool:
    return node.target in _ADDS or (node.op == "call_method" and node.target in ("add", "add_"))


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
        if not _is_add(node) or owner_path(node) != path or len(operands) != 2:
            continue
        for x, other in (operands, operands[::-1]):
            if _origin(gm, x, inner | found, entries) in entries and reaches(other, entries, set(nodes)):
                found[node] = x
    return found


def _origin(gm: fx.GraphModule, node: fx.Node, adds: dict[fx.Node, fx.Node], entries: set[fx.Node]) -> fx.Node:
    """Follow identities, views and residual adds back to the value that they show, a module's entry at the farthest."""
    while node not in entries:
        identity = node.op == "call_module" and isinstance(gm.get_submodule(str(node.target)), nn.Identity)
        view = node.op == "call_method" and node.target in _VIEW_METHODS
        if node in adds:
            node = adds[node]
        elif identity or view:
            node = node.all_input_nodes[0]
        else:
            break
    return node
