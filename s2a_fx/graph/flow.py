"""What a node's value depends on: the model's input, a parameter that trains, another node."""

from collections.abc import Collection
from typing import Any

import torch
from torch import fx, nn

from s2a_fx.graph.calls import is_in_place, writes
from s2a_fx.graph.regions import GradMode, Region, scopes_of
from s2a_fx.graph.torch_internals import acts


def has_effects(gm: nn.Module, node: fx.Node) -> bool:
    """Whether a node does more than compute a value: it writes to an operand or a buffer, or acts otherwise."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return acts(module) or is_in_place(module)
    return node.op in ("call_function", "call_method") and (node.is_impure() or writes(gm, node))


def eliminate_dead_code(gm: fx.GraphModule) -> None:
    """Erase what nobody reads; what writes stays, `y.mul_(2)` as a statement, which torch.fx takes for dead."""
    gm.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or has_effects(gm, node))


def dependent_nodes(gm: fx.GraphModule) -> set[fx.Node]:
    """The nodes whose value depends on the model's input."""
    found: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node.op == "placeholder" or any(operand in found for operand in node.all_input_nodes):
            found.add(node)
    return found


def trained_nodes(gm: fx.GraphModule) -> set[fx.Node]:
    """The floating values that depend on a parameter that trains, or on an input that needs a gradient: one flows back to them."""
    found: set[fx.Node] = set()
    for node in gm.graph.nodes:
        trains = any(operand in found for operand in node.all_input_nodes) or _trains(gm, node)
        if trains and _may_need_grad(node) and _runs_with_grad(gm, node):
            found.add(node)
    return found


def reaches(node: fx.Node, sources: Collection[fx.Node], inside: Collection[fx.Node] | None = None) -> bool:
    """Whether `node` is one of `sources` or computed from one, on the way through nodes `inside` alone (None: any)."""
    stack, seen = [node], {node}
    while stack:
        current = stack.pop()
        if current in sources:
            return True
        for operand in current.all_input_nodes:
            if operand not in seen and (inside is None or operand in inside or operand in sources):
                seen.add(operand)
                stack.append(operand)
    return False


def attribute(gm: nn.Module, path: str) -> Any:
    """What stands at a dotted path in the model."""
    value: Any = gm
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _may_need_grad(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, torch.Tensor | int | bool) or (isinstance(value, torch.Tensor) and value.is_floating_point())


def _runs_with_grad(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the model computes a node with gradients on: the innermost context tells."""
    module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
    own = (module.scope,) if isinstance(module, GradMode) else ()
    modes = [dict(scope.options)["enabled"] for scope in (*scopes_of(node), *own) if scope.kind == "grad_mode"]
    return not modes or bool(modes[-1])


def _trains(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "placeholder":
        return isinstance(value := node.meta.get("val"), torch.Tensor) and value.requires_grad
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return any(p.requires_grad for p in module.parameters()) or (isinstance(module, Region) and bool(module.trained()))
    value = attribute(gm, str(node.target)) if node.op == "get_attr" else None
    return isinstance(value, torch.Tensor) and value.requires_grad
