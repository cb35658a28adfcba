"""Blocks of a graph as modules of their own, so that FSDP2 can gather the weights of one block at a time.

    before  fc1.weight, fc2.weight -> coded_mlp -> add      the graph reads weights of layers that it never calls
    after   unit(x)                                         a module that owns the block, and is called

FSDP2 gathers a module's weights when the module is called. A rewritten graph reads many weights directly, and a recomputed branch
runs layers that stand elsewhere: only a module around all of it is called before any of them is read. The graph module stays one:
parameters keep their names and their places.
"""

import operator
from collections.abc import Iterable, Sequence
from typing import Any

from torch import fx, nn

from s2a_fx.graph.provenance import module_stack
from s2a_fx.nn.recompute import Recomputed

UNITS = "fsdp_units"


def make_units(gm: fx.GraphModule, paths: Sequence[str]) -> list[nn.Module]:
    """Put the nodes of each module path into a module that is called in their place; the modules, in order.

    Left alone: a path whose nodes depend on each other through other nodes, or run layers that stand outside it.
    """
    unit_of: dict[fx.Node, str] = {}
    for path in paths:
        nodes = [n for n in gm.graph.nodes if _belongs(n, path)]
        if nodes and _is_closed(gm, nodes, path):
            unit_of.update(dict.fromkeys(nodes, path))
    parts = {path: [n for n in gm.graph.nodes if unit_of.get(n) == path] for path in paths}
    parts = {path: nodes for path, nodes in parts.items() if nodes}
    gm.add_submodule(UNITS, nn.ModuleList(_unit(gm, path, nodes) for path, nodes in parts.items()))
    gm.graph = _calling(gm.graph, list(parts.values()))
    gm.recompile()
    return list(gm.get_submodule(UNITS))  # type: ignore[call-overload]


def _belongs(node: fx.Node, path: str) -> bool:
    if node.op in ("placeholder", "output"):
        return False
    if node.op in ("call_module", "get_attr"):
        return f"{node.target}.".startswith(f"{path}.")
    return any(place == path for place, _ in module_stack(node))


def _is_closed(gm: fx.GraphModule, nodes: list[fx.Node], path: str) -> bool:
    """Whether the nodes can run in one piece, and every layer that they run again stands under `path`."""
    inside = set(nodes)
    after: set[fx.Node] = set()  # nodes outside that depend on nodes inside
    for node in gm.graph.nodes:
        if node in inside and any(operand in after for operand in node.all_input_nodes):
            return False
        if node not in inside and any(operand in inside or operand in after for operand in node.all_input_nodes):
            after.add(node)
    own = {id(p) for p in gm.get_submodule(path).parameters()}
    called = [gm.get_submodule(str(n.target)) for n in nodes if n.op == "call_module"]
    return all(id(p) in own for m in called if isinstance(m, Recomputed) for p in m.body.parameters())


def _inputs(nodes: list[fx.Node]) -> list[fx.Node]:
    inside = set(nodes)
    return list(dict.fromkeys(o for n in nodes for o in n.all_input_nodes if o not in inside))


def _outputs(nodes: list[fx.Node]) -> list[fx.Node]:
    inside = set(nodes)
    return [n for n in nodes if any(user not in inside for user in n.users)]


def _unit(gm: fx.GraphModule, path: str, nodes: list[fx.Node]) -> nn.Module:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {node: graph.placeholder(node.name) for node in _inputs(nodes)}
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    found = [copies[node] for node in _outputs(nodes)]
    graph.output(found[0] if len(found) == 1 else tuple(found))
    unit = fx.GraphModule(gm, graph)
    unit.add_submodule(path, gm.get_submodule(path))  # the very module: its parameters stand under one name in the whole
    return unit


def _calling(graph: fx.Graph, parts: Sequence[list[fx.Node]]) -> fx.Graph:
    """The graph with a call of a unit in the place of each part."""
    part_of = {node: index for index, nodes in enumerate(parts) for node in nodes}
    made = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}

    def copy(node: fx.Node) -> fx.Node:
        if node not in copies:
            if node in part_of:
                call(part_of[node])
            else:
                operands(node.all_input_nodes)
                copies[node] = made.node_copy(node, copies.__getitem__)
        return copies[node]

    def operands(nodes: Iterable[fx.Node]) -> None:
        for node in nodes:
            copy(node)

    def call(index: int) -> None:
        nodes = parts[index]
        operands(_inputs(nodes))
        result: Any = made.call_module(f"{UNITS}.{index}", tuple(copies[n] for n in _inputs(nodes)))
        found = _outputs(nodes)
        for place, node in enumerate(found):
            copies[node] = result if len(found) == 1 else made.call_function(operator.getitem, (result, place))

    for node in graph.nodes:
        if node not in part_of or node in _outputs(parts[part_of[node]]):
            copy(node)
    return made
