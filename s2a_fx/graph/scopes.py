"""Close a graph's scopes into modules, and open them again.

open      nodes with `meta["scopes"]`
closed    one `ScopeRegion` for each run of nodes in a scope, which may hold further ones
"""

import operator
from collections.abc import Sequence
from typing import Any

from torch import fx

from s2a_fx.graph.edit import extract_region, free_path
from s2a_fx.graph.flow import has_effects
from s2a_fx.graph.provenance import owner_path
from s2a_fx.graph.regions import REGIONS, SCOPES, Scope, ScopeRegion, scopes_of


def close_scopes(gm: fx.GraphModule) -> None:
    """Replace the nodes of each scope by a call of a module that runs them in it."""
    _adopt_inserted(gm.graph)
    for run in _runs(gm):
        _close(gm, run)


def open_scopes(gm: fx.GraphModule) -> bool:
    """Replace each call of a `ScopeRegion` by the nodes that it stands for; returns whether there was one."""
    opened = False
    while regions := [node for node in gm.graph.find_nodes(op="call_module") if isinstance(_module(gm, node), ScopeRegion)]:
        for node in regions:
            _open(gm, node)
        opened = True
    return opened


def _module(gm: fx.GraphModule, node: fx.Node) -> Any:
    return gm.get_submodule(str(node.target))


def _adopt_inserted(graph: fx.Graph) -> None:
    """Put a node that a pass inserted into the scopes that all its readers and one of its operands are in."""
    for node in graph.nodes:
        if SCOPES in node.meta or node.op in ("placeholder", "get_attr", "output") or not node.users:
            continue
        readers = scopes_around(list(node.users))
        operands = [common_scopes([readers, scopes_of(operand)]) for operand in node.all_input_nodes]
        node.meta[SCOPES] = max(operands, key=len, default=())


def common_scopes(stacks: Sequence[tuple[Scope, ...]]) -> tuple[Scope, ...]:
    """The scopes that begin every stack."""
    first, *others = stacks
    depth = next((i for i, scope in enumerate(first) if any(o[i : i + 1] != (scope,) for o in others)), len(first))
    return first[:depth]


def scopes_around(nodes: Sequence[fx.Node]) -> tuple[Scope, ...]:
    """The scopes that all of several nodes are in, outermost first."""
    return common_scopes([scopes_of(node) for node in nodes])


def _runs(gm: fx.GraphModule) -> list[list[fx.Node]]:
    """The nodes of each outermost scope, in order; a scope whose values return to it from outside makes several runs."""
    runs: dict[Scope, list[list[fx.Node]]] = {}
    outside: dict[Scope, set[fx.Node]] = {}  # what is computed outside from the present run of a scope
    for node in gm.graph.nodes:
        own = scopes_of(node)[:1]
        for scope, found in runs.items():
            if (scope,) != own and any(o in outside[scope] or o in found[-1] for o in node.all_input_nodes):
                outside[scope].add(node)
        for scope in own:
            found = runs.setdefault(scope, [[]])
            left = outside.setdefault(scope, set())
            if any(operand in left for operand in node.all_input_nodes):
                found.append([])
                left.clear()
            found[-1].append(node)
    return [run for found in runs.values() for run in found]


def _close(gm: fx.GraphModule, run: list[fx.Node]) -> None:
    scope = scopes_of(run[0])[0]
    inside = set(run)
    _move_readers_behind(run, inside)
    for node in run:
        node.meta[SCOPES] = scopes_of(node)[1:]
    operands = list(dict.fromkeys(o for node in run for o in node.all_input_nodes if o not in inside))
    outputs = [node for node in run if any(user not in inside for user in node.users)]
    single = len(outputs) == 1
    body, _ = extract_region(gm, run, operands, outputs)
    close_scopes(body)
    if single:
        results: Any = body.graph.output_node().args[0]
        body.graph.output_node().args = (results[0],)
    body.recompile()
    kind = REGIONS[scope.kind]
    module = kind(scope, body, any(has_effects(gm, node) for node in run)).train(gm.training)
    path = free_path(gm, owner_path(run[0]), scope.kind)
    gm.add_submodule(path, module)
    with gm.graph.inserting_after(run[-1]):
        call = gm.graph.call_module(path, tuple(operands))
    call.meta["nn_module_stack"] = _common_stack(run)
    for node in run:
        node.meta[SCOPES] = ()  # what stands for its value is in none
    replace_by_values(gm.graph, call, outputs, single)
    for node in reversed(run):
        gm.graph.erase_node(node)


def replace_by_values(graph: fx.Graph, call: fx.Node, outputs: Sequence[fx.Node], single: bool) -> None:
    """Let what reads `outputs` read the value of `call`: it itself, or the elements of the tuple that it returns."""
    if single:
        call.meta = {**outputs[0].meta, **{key: call.meta[key] for key in ("nn_module_stack",) if key in call.meta}}
    elif outputs and all("val" in node.meta for node in outputs):
        call.meta["val"] = tuple(node.meta["val"] for node in outputs)
    after = call
    for index, node in enumerate(outputs):
        value = call
        if not single:
            with graph.inserting_after(after):
                value = after = graph.call_function(operator.getitem, (call, index))
            value.meta = dict(node.meta)
        node.replace_all_uses_with(value)


def _move_readers_behind(run: list[fx.Node], inside: set[fx.Node]) -> None:
    """Move what stands between the nodes of a run and reads them behind the last of them, in order."""
    last, reading = run[-1], set(inside)
    moved = []
    node = run[0]
    while node is not last:
        if node not in inside and any(operand in reading for operand in node.all_input_nodes):
            reading.add(node)
            moved.append(node)
        node = node.next
    for node in reversed(moved):
        last.append(node)


def _common_stack(run: Sequence[fx.Node]) -> dict[str, Any]:
    """The modules around all nodes of a run."""
    stacks = [list(node.meta.get("nn_module_stack", {}).items()) for node in run]
    depth = min(map(len, stacks))
    while depth and any(stack[:depth] != stacks[0][:depth] for stack in stacks):
        depth -= 1
    return dict(stacks[0][:depth])


def _open(gm: fx.GraphModule, call: fx.Node) -> None:
    region: ScopeRegion = _module(gm, call)
    around = (*scopes_of(call), region.scope)
    values: dict[fx.Node, Any] = dict(zip(region.body.graph.find_nodes(op="placeholder"), call.args, strict=True))
    result: Any = None
    with gm.graph.inserting_before(call):
        for node in region.body.graph.nodes:
            if node.op == "output":
                result = fx.node.map_arg(node.args[0], values.__getitem__)
            elif node.op != "placeholder":
                values[node] = gm.graph.node_copy(node, values.__getitem__)
                values[node].meta[SCOPES] = (*around, *scopes_of(node))
                if node.op == "call_module" and isinstance(inner := _module(region.body, node), ScopeRegion):
                    values[node].target = free_path(gm, "", str(node.target))
                    gm.add_submodule(str(values[node].target), inner)
    if isinstance(result, tuple):
        for reader in list(call.users):
            reader.replace_all_uses_with(result[reader.args[1]])  # type: ignore[index]
            gm.graph.erase_node(reader)
    elif result is not None:
        call.replace_all_uses_with(result)
    gm.graph.erase_node(call)
    gm.delete_submodule(str(call.target))
