"""Residual blocks that are modules: those whose own forward adds.

1. A module is a block if it adds to what it was entered with and no module around it does; so is each module of its class (a ResNet
   block whose shortcut is a convolution). What the module computes after the addition, and before it, belongs to the block.
2. A module without such modules around or inside it is a block, too, if its additions are residual, and its output has the shape of
   its input (CoaT cuts off the class token before it adds).

A module that adds the same more than twice, an encoder with the loop inside, is no block.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import fx, nn

from s2a_fx.graph.additions import Addition, DataFlow, is_tensor, shown_values, summands
from s2a_fx.graph.blocks import Block
from s2a_fx.graph.calls import call_of
from s2a_fx.graph.provenance import module_stack
from s2a_fx.graph.regions import modules_within

_NORMS = (F.layer_norm, F.rms_norm, F.batch_norm, F.group_norm, F.instance_norm)


def module_blocks(flow: DataFlow, additions: Mapping[fx.Node, Addition]) -> list[tuple[Block, list[fx.Node]]]:
    """The modules that are residual blocks, each with its residual additions."""
    modules = _Modules(flow, additions)
    entered = list(modules.that_add_to_their_entry())
    taken = {node for block, _ in entered for node in block.nodes}
    return entered + list(modules.of_one_shape(taken))


def is_inserted(node: fx.Node) -> bool:
    """Whether a node belongs to a layer that a pass has put beside the model's."""
    return any(_is_ours(kind) for _, kind in module_stack(node))


def _is_ours(kind: object) -> bool:
    return getattr(kind, "__module__", "").startswith("s2a_fx.nn")


class _Modules:
    """The modules that were traced through, and what they add."""

    def __init__(self, flow: DataFlow, additions: Mapping[fx.Node, Addition]) -> None:
        self.flow = flow
        self.additions = additions
        self.members = _members(flow.gm)
        self.homes: dict[str, list[Addition]] = {}
        for addition in additions.values():
            if addition.home in self.members:
                self.homes.setdefault(addition.home, []).append(addition)
        self.closing = self._closing_additions()

    def that_add_to_their_entry(self) -> Iterator[tuple[Block, list[fx.Node]]]:
        """The blocks of rule 1."""
        types = _module_types(self.flow.gm)
        homes = {self.additions[node].home for node in self.closing}
        kinds = {types[path] for path in homes} - {types[path] for path in homes if self._repeats(path)}
        for path in _outermost([path for path in self.members if types[path] in kinds]):
            nodes, outputs = self.members[path], _outputs(self.members[path])
            own = [node for node in nodes if node in self.closing]
            entry = next((self.closing[node] for node in own if self.additions[node].home == path), self._first_entry(nodes))
            if len(outputs) == 1 and entry is not None:
                yield Block(path, entry, tuple(nodes), outputs[0]), own

    def of_one_shape(self, taken: set[fx.Node]) -> Iterator[tuple[Block, list[fx.Node]]]:
        """The blocks of rule 2, outside of the nodes that are `taken`; of those that share nodes the largest."""
        taken = set(taken)
        for path in sorted(self.homes, key=lambda path: -len(self.members[path])):
            nodes = self.members[path]
            outputs = _outputs(nodes)
            if len(outputs) != 1 or not taken.isdisjoint(nodes) or self._repeats(path):
                continue
            alike = (o for o in _entries(nodes) if o in self.flow.dependent and _shape(o) == _shape(outputs[0]))
            if (entry := next(alike, None)) is not None:
                taken.update(nodes)
                yield Block(path, entry, tuple(nodes), outputs[0]), [node for node in nodes if node in self.additions]

    def _closing_additions(self) -> dict[fx.Node, fx.Node]:
        """The additions to what their home was entered with, or to a norm of such a sum, each with that entry."""
        found: dict[fx.Node, fx.Node] = {}
        for addition in (a for a in self.additions.values() if a.home in self.homes):
            entry = self._entry_of_home(addition)
            call = call_of(self.flow.gm, addition.entry)
            if entry is None and call is not None and call.operator in _NORMS and call.input in found:
                entry = found[call.input] if self.additions[call.input].home == addition.home else None
            if entry is not None:
                found[addition.node] = entry
        return found

    def _entry_of_home(self, addition: Addition) -> fx.Node | None:
        """The value that an addition adds to, if its home was entered with it."""
        inside = set(self.members[addition.home])
        outside = (v for v in shown_values(self.flow.gm, addition.shortcut, self.additions) if v not in inside)
        entry = next(outside, None)
        return None if entry is None or entry.op == "get_attr" else entry

    def _first_entry(self, nodes: Sequence[fx.Node]) -> fx.Node | None:
        """What a module was entered with: a summand, if its shortcut was computed outside, or else what it reads first."""
        entries, inside = _entries(nodes), set(nodes)
        read = ((entry, reader) for entry in entries for reader in entry.users if reader in inside)
        added = (entry for entry, reader in read if entry in (summands(self.flow.gm, reader) or ()))
        return next(added, next(iter(entries), None))

    def _repeats(self, path: str) -> bool:
        """Whether a module adds the same more than twice, as a loop over layers does; branches of one value count as one."""
        branches: dict[fx.Node, list[object]] = {}
        for addition in self.homes.get(path, ()):
            branches.setdefault(addition.entry, []).append(self._signature(addition))
        added = list(branches.values())
        return len(added) > 2 and any(added[period:] == added[:-period] for period in range(1, len(added) // 2 + 1))

    def _signature(self, addition: Addition) -> tuple[object, ...]:
        """The calls of a branch in order, and the shapes of their parameters."""
        nodes = self.flow.between(addition.entry, addition.branch)
        return tuple(self._kind(node) for node in sorted(nodes, key=self.flow.order.__getitem__))

    def _kind(self, node: fx.Node) -> tuple[object, ...]:
        called = _calls(self.flow.gm.get_submodule(str(node.target))) if node.op == "call_module" else (node.target,)
        return *called, *(tuple(parameter.shape) for parameter in self.flow.parameters(node))


def _calls(module: nn.Module) -> Iterator[object]:
    """What a module consists of: the types of those inside, and the calls of those that are graphs."""
    for inner in modules_within(module):
        if isinstance(inner, fx.GraphModule):
            yield from (node.target for node in inner.graph.nodes if node.op in ("call_function", "call_method"))
        else:
            yield type(inner)


def _members(gm: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """The nodes inside each module that was traced through."""
    members: dict[str, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        for path, kind in module_stack(node):
            if _is_ours(kind):
                break  # what passes insert, LoRA's sum say, is no block of the model's
            if path and not (node.op == "call_module" and path == node.target):
                members.setdefault(path, []).append(node)
    return members


def _module_types(gm: fx.GraphModule) -> dict[str, object]:
    """The types of the modules that were traced through: the graph module keeps them as empty shells, provenance knows."""
    return {path: kind for node in gm.graph.nodes for path, kind in module_stack(node)}


def _outermost(paths: Sequence[str]) -> list[str]:
    return [path for path in paths if not any(path.startswith(outer + ".") for outer in paths)]


def _entries(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    inside = set(nodes)
    found = [o for node in nodes for o in node.all_input_nodes if o not in inside and o.op != "get_attr" and is_tensor(o)]
    return list(dict.fromkeys(found))


def _outputs(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    inside = set(nodes)
    return [node for node in nodes if is_tensor(node) and any(user not in inside for user in node.users)]


def _shape(node: fx.Node) -> torch.Size | None:
    return node.meta["val"].shape if is_tensor(node) else None
