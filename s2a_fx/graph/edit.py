"""Graph surgery: insert and replace calls, extract a region into a module, splice a module into a graph."""

import re
from collections.abc import Sequence
from typing import Any

from timm.layers import get_notrace_functions
from torch import fx, nn

from s2a_fx.graph.flow import attribute
from s2a_fx.graph.provenance import module_stack, owner_path, owner_stack
from s2a_fx.graph.regions import SCOPES, scopes_of
from s2a_fx.graph.traced_module import TracedModule


def extract_region(
    gm: nn.Module, nodes: Sequence[fx.Node], operands: Sequence[fx.Node], outputs: Sequence[fx.Node] | None = None
) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """Copy a part of a graph into a module of its own; `gm` is left as it is.

    Args:
        nodes: the part, in order.
        operands: the nodes outside that the part reads; the arguments of the result.
        outputs: the nodes whose values the result returns as a tuple; left out, it returns the value of the last node.

    Returns:
        The part, whose modules and tensors are those of `gm`, and for each operand and node its copy.
    """
    graph = fx.Graph()
    copies = {operand: graph.placeholder(f"operand_{index}") for index, operand in enumerate(operands)}
    for operand, copy in copies.items():
        copy.meta = {key: value for key, value in operand.meta.items() if key != SCOPES}  # it is computed outside
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[nodes[-1]] if outputs is None else tuple(copies[node] for node in outputs))
    part = TracedModule(gm, graph, "Part")
    return part, dict(zip(copies, part.graph.nodes, strict=False))


def splice_module(
    gm: fx.GraphModule, path: str, module: nn.Module, args: Sequence[fx.Node], before: fx.Node, like: fx.Node | None = None
) -> fx.Node:
    """Put `module` at `path`, and its own nodes, not one call of it, before a node; returns the last of them.

    Each layer inside is then a node to analyses and later passes. Their provenance is that of `like`, if they belong where that
    stands, and the path.
    """
    gm.add_submodule(path, module.train(gm.training))
    around = owner_stack(like) if like is not None else {}
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
                stack = {place: (place, kind) for place, kind in [(path, type(module)), *inner]}
                values[node].meta["nn_module_stack"] = {**around, **stack}
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


def free_path(gm: nn.Module, parent: str, name: str) -> str:
    """A path under `parent` where nothing stands yet: `parent.name`, or with a number."""
    wanted = path = f"{parent}.{name}" if parent else name
    count = 1
    while _is_taken(gm, path):
        path = f"{wanted}_{count}"
        count += 1
    return path


def _is_taken(gm: nn.Module, path: str) -> bool:
    try:
        attribute(gm, path)
    except AttributeError:
        return False
    return True


def add_module(root: nn.Module, path: str, module: nn.Module, like: str) -> None:
    """Put `module` at `path`, where nothing stands yet, in the mode of the module at the path `like`."""
    owner = root
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in dict(owner.named_children()):
            owner.add_module(parent, nn.Module())
        owner = owner.get_submodule(parent)
    owner.add_module(name, module.train(root.get_submodule(like).training))


def snake_case(kind: type) -> str:
    """The name of a class in lower case, its words joined by underscores: `CodedLayerNorm` -> `coded_layer_norm`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.__name__).lower()


def insert_call(gm: fx.GraphModule, path: str, module: nn.Module, args: tuple[Any, ...], like: fx.Node | None = None) -> fx.Node:
    """Put `module` at `path` and call it at the present insertion point; it trains or not as the graph module does.

    The new node's provenance is that of `like`, if it belongs where that stands, and the path.
    """
    gm.add_submodule(path, module.train(gm.training))
    node = gm.graph.call_module(path, args)
    around = owner_stack(like) if like is not None else {}
    node.meta["nn_module_stack"] = {**around, path: (path, type(module))}
    return node


def replace_node(
    gm: fx.GraphModule,
    node: fx.Node,
    module: nn.Module,
    operands: tuple[Any, ...],
    path: str | None = None,
    before: fx.Node | None = None,
) -> fx.Node:
    """Replace `node` by a call of `module` on `operands`, put at `path` or at a free one beside it; returns the call.

    The call stands where the node stood, or `before` an earlier one.
    """
    with gm.graph.inserting_before(before or node):
        call = insert_call(gm, path or free_path(gm, owner_path(node), snake_case(type(module))), module, operands, like=node)
    call.meta["val"], call.meta[SCOPES] = node.meta["val"], scopes_of(node)
    node.replace_all_uses_with(call)
    gm.graph.erase_node(node)
    return call
