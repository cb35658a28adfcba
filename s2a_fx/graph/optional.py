"""Arguments that a call may leave out: labels, say, without which a model returns no loss.

An argument is optional if the capture without it is the same graph with only what depends on it removed. What depends on it becomes
a module that returns nothing where the argument is None.
"""

import operator
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from s2a_fx.graph.edit import add_module, extract_region, free_path
from s2a_fx.graph.flow import has_effects
from s2a_fx.graph.regions import SCOPES, ModeRegion, WhenGiven, scopes_of
from s2a_fx.graph.scopes import close_scopes, scopes_around
from s2a_fx.graph.training_switch import TrainingSwitch


@dataclass(frozen=True)
class FlatCapture:
    """A flat captured graph, and the model whose modules it calls."""

    model: nn.Module
    graph: fx.Graph


def dependents_of(full: FlatCapture, without: FlatCapture, name: str) -> list[fx.Node] | None:
    """The nodes that one argument alone is computed for, in order; None if the argument is not optional.

    Args:
        full: captured with the argument.
        without: the same model, or a copy, captured without it.
        name: the argument's placeholder.
    """
    readers: dict[fx.Node, None] = {}
    for node in full.graph.nodes:
        if (node.op == "placeholder" and node.target == name) or any(operand in readers for operand in node.all_input_nodes):
            readers[node] = None
    if not _is_same(full, without, readers):
        return None
    dependents = {node for node in readers if node.op not in ("placeholder", "output")}
    for node in reversed(full.graph.nodes):  # what is computed for them alone
        if node.op.startswith("call") and node.users and all(user in dependents for user in node.users):
            dependents.add(node)
    return [node for node in full.graph.nodes if node in dependents]


def _is_same(full: FlatCapture, without: FlatCapture, readers: Container[fx.Node]) -> bool:
    """Whether two graphs are the same but for `readers`, what is computed for them alone, and dead code."""
    twins: dict[fx.Node, fx.Node] = {}
    ours, theirs = _live_nodes(full, readers), _live_nodes(without, ())
    if len(ours) != len(theirs):
        return False
    for a, b in zip(ours, theirs, strict=True):
        arguments = fx.node.map_arg((b.args, b.kwargs), lambda node: twins.get(node, node))
        if not _is_same_call(full.model, a, without.model, b) or (a.args, a.kwargs) != arguments:
            return False
        twins[b] = a
    results = [None if isinstance(value, fx.Node) and value in readers else value for value in _results(full.graph)]
    others = [twins.get(value, value) if isinstance(value, fx.Node) else value for value in _results(without.graph)]
    absent = absent_results(full.graph, readers)
    return others in (results, [value for index, value in enumerate(results) if index not in absent])


def _live_nodes(capture: FlatCapture, left_out: Container[fx.Node]) -> list[fx.Node]:
    """The nodes that a graph still needs when it leaves some out."""
    live: set[fx.Node] = {capture.graph.output_node()}
    for node in reversed(capture.graph.nodes):
        if node in left_out:
            continue
        if node.op == "placeholder" or has_effects(capture.model, node) or any(user in live for user in node.users):
            live.add(node)
    return [node for node in capture.graph.nodes if node in live and node.op != "output"]


def _results(graph: fx.Graph) -> Sequence[Any]:
    return graph.output_node().args[0]  # type: ignore[return-value]


def _is_same_call(model: nn.Module, a: fx.Node, other: nn.Module, b: fx.Node) -> bool:
    if a.op == b.op == "call_module":
        return _is_same_module((model, str(a.target)), (other, str(b.target)))
    return (a.op, a.target) == (b.op, b.target)


def _is_same_module(one: tuple[nn.Module, str], other: tuple[nn.Module, str]) -> bool:
    """Whether two models have the same at two paths: one of their own modules, or equal ones that the capture made."""
    a, b = (model.get_submodule(path) for model, path in (one, other))
    if isinstance(a, TrainingSwitch) and isinstance(b, TrainingSwitch):
        return (a.function, a.differences) == (b.function, b.differences)
    if isinstance(a, ModeRegion) and isinstance(b, ModeRegion):
        return all(_is_same_body(*bodies) for bodies in ((a.body, b.body), (a.eval_body, b.eval_body)))
    return one[1] == other[1] and type(a) is type(b)


def _is_same_body(a: fx.GraphModule, b: fx.GraphModule) -> bool:
    ours, others = list(a.graph.nodes), list(b.graph.nodes)
    twins = dict(zip(others, ours, strict=False))
    return len(ours) == len(others) and all(
        _is_same_call(a, x, b, y) and (x.args, x.kwargs) == fx.node.map_arg((y.args, y.kwargs), twins.__getitem__)
        for x, y in zip(ours, others, strict=True)
    )


def absent_results(graph: fx.Graph, dependents: Container[fx.Node]) -> tuple[int, ...]:
    """Which of a graph's results the argument's dependents make."""
    return tuple(i for i, value in enumerate(_results(graph)) if isinstance(value, fx.Node) and value in dependents)


def make_optional(capture: FlatCapture, names: Sequence[str], dependents: Sequence[fx.Node]) -> None:
    """Make modules that return nothing without the arguments of the nodes that those alone are needed for.

    Each run of dependents that no other call interrupts becomes one module: the order of calls stays.
    """
    given = [node for node in capture.graph.find_nodes(op="placeholder") if node.target in names]
    inside, run = set(dependents), []
    for node in list(capture.graph.nodes):
        if node in inside:
            run.append(node)
        elif run and node.op not in ("get_attr", "placeholder"):
            _replace_run(capture, given, run)
            run = []


def _replace_run(capture: FlatCapture, given: Sequence[fx.Node], run: Sequence[fx.Node]) -> None:
    inside, graph = set(run), capture.graph
    around = scopes_around(run)
    for node in run:
        node.meta[SCOPES] = scopes_of(node)[len(around) :]
    operands = list(dict.fromkeys([*given, *(o for node in run for o in node.all_input_nodes if o not in inside)]))
    outputs = [node for node in run if any(user not in inside for user in node.users)]
    body, _ = extract_region(capture.model, run, operands, outputs)
    close_scopes(body)
    body.recompile()
    writes = any(has_effects(capture.model, node) for node in run)
    path = free_path(capture.model, "", "when_" + "_".join(str(node.target) for node in given))
    add_module(capture.model, path, WhenGiven(body, len(given), len(outputs), writes), like="")
    with graph.inserting_after(run[-1]):
        call = graph.call_module(path, tuple(operands))
    call.meta = {SCOPES: around, "nn_module_stack": {}}
    after = call
    for index, node in enumerate(outputs):
        with graph.inserting_after(after):
            after = graph.call_function(operator.getitem, (call, index))
        after.meta = dict(call.meta)
        node.replace_all_uses_with(after)
    for node in reversed(run):
        graph.erase_node(node)
