"""A part of a graph as a module of its own, and a module as a part of a graph."""

from collections.abc import Sequence
from typing import Any

from timm.layers import get_notrace_functions
from torch import fx, nn

from s2a_fx.analysis.provenance import module_stack
from s2a_fx.nn.ghost import Ghost


def lifted(
    gm: fx.GraphModule, nodes: Sequence[fx.Node], operands: Sequence[fx.Node], ghost: fx.Node | None
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The function from `operands` to the last of `nodes`; and the same with the layer `ghost` as a `Ghost`, for the backward."""
    body, copies = _copied(gm, nodes, operands)
    if ghost is None:
        return body, body
    backward_body, copies = _copied(gm, nodes, operands)
    backward_body.add_submodule("ghost", Ghost(gm.get_submodule(str(ghost.target))))
    copies[ghost].target = "ghost"
    backward_body.delete_all_unused_submodules()
    backward_body.recompile()
    return body, backward_body


def _copied(
    gm: fx.GraphModule, nodes: Sequence[fx.Node], operands: Sequence[fx.Node]
) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    graph = fx.Graph()
    copies = {operand: graph.placeholder(f"operand_{index}") for index, operand in enumerate(operands)}
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].meta = {}
    graph.output(copies[nodes[-1]])
    module = fx.GraphModule(gm, graph, "Part")
    return module, dict(zip(copies, module.graph.nodes, strict=False))


def call_spliced(
    gm: fx.GraphModule, path: str, module: nn.Module, args: Sequence[fx.Node], before: fx.Node, like: fx.Node | None = None
) -> fx.Node:
    """Put `module` at `path`, and its own nodes, not one call of it, before a node; returns the last of them.

    Each layer inside is then a node to analyses and later passes. Their provenance is that of `like`, if they belong where that
    stands, and the path.
    """
    gm.add_submodule(path, module.train(gm.training))
    around = module_stack(like) if like is not None else []
    if like is not None and like.op == "call_module" and around and around[-1][0] == like.target:
        around = around[:-1]
    traced = _PartTracer(len(args)).trace(module)
    given = iter(args)
    values: dict[fx.Node, fx.Node] = {}
    with gm.graph.inserting_before(before):
        for node in traced.nodes:
            if node.op == "placeholder":
                values[node] = next(given)
            elif node.op == "output":
                return values[node.args[0]]  # type: ignore[index]
            else:
                values[node] = _within(gm, path, node, values)
                inner = [(f"{path}.{place}", kind) for place, kind in module_stack(node)]
                stack = {place: (place, kind) for place, kind in [*around, (path, type(module)), *inner]}
                values[node].meta["nn_module_stack"] = stack
    raise AssertionError("a traced graph ends in an output")


class _PartTracer(fx.Tracer):
    """A tracer of modules that take so many tensors, `*taps` among them."""

    def __init__(self, arity: int) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self.arity = arity

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        return root_fn, [self.root, *(self.create_proxy("placeholder", f"input_{i}", (), {}) for i in range(self.arity))]


def _within(gm: fx.GraphModule, path: str, node: fx.Node, values: dict[fx.Node, fx.Node]) -> fx.Node:
    target = f"{path}.{node.target}" if node.op in ("call_module", "get_attr") else node.target
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    return gm.graph.create_node(node.op, target, args, kwargs)  # type: ignore[arg-type]
