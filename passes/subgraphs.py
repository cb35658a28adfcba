"""A part of a graph as a graph module of its own, whose modules stay those of the model."""

from collections.abc import Sequence

from torch import fx

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
