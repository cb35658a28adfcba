"""What no form of its own serves: kept as its coded inputs, and computed again in the backward; the side branch's blocks whole."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import fx, nn

from s2a_fx.analysis.normalized_branches import runs_once
from s2a_fx.graph.calls import is_in_place, operator_of, writes
from s2a_fx.graph.edit import free_path, insert_call, snake_case
from s2a_fx.graph.flow import dependent_nodes
from s2a_fx.graph.provenance import module_stack, owner_path
from s2a_fx.graph.regions import SCOPES, modules_within
from s2a_fx.graph.scopes import scopes_around
from s2a_fx.nn.coded_input import WHOLE, CodedInput, Parts
from s2a_fx.nn.ghost import can_be_ghost, extract_bodies
from s2a_fx.nn.lite_side_branch import LiteSideBlock


def serves_input(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Any operator that is a function of tensors: no batch norm, which would count a batch twice, nothing in place, no view."""
    value = node.meta.get("val")
    inputs = [o.meta.get("val") for o in node.all_input_nodes]
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or not inputs:
        return False
    if any(isinstance(v, list | tuple) for v in inputs):
        return False
    if node.op == "call_module":
        modules = modules_within(gm.get_submodule(str(node.target)))
        return not any(runs_once(m) or _is_coded(m) or is_in_place(m) for m in modules)
    return node.op in ("call_function", "call_method") and operator_of(gm, node) is not F.batch_norm and not writes(gm, node)


def _is_coded(module: nn.Module) -> bool:
    return type(module).__module__.startswith("s2a_fx.nn")


def replace_input(gm: fx.GraphModule, node: fx.Node, bits: int) -> None:
    """Replace the node by the form that keeps its coded inputs."""
    replace_by_coded_input(gm, (node,), bits)


def replace_by_coded_input(
    gm: fx.GraphModule, nodes: tuple[fx.Node, ...], bits: int, centered: Sequence[fx.Node | None] = (), parts: Parts = WHOLE
) -> None:
    """Replace a run of nodes, the last of which is its output, by one `CodedInput`; `centered` are coded less their mean."""
    inside = set(nodes)
    outside = dict.fromkeys(o for n in nodes for o in n.all_input_nodes if o not in inside)
    dependent = dependent_nodes(gm)
    wide = [o for o in outside if o in dependent and is_float(o)]
    operands = (*wide, *(o for o in outside if o not in wide))
    body, backward_body = extract_bodies(gm, nodes, operands, _ghost(gm, nodes[-1]))
    places = tuple(index for index, operand in enumerate(wide) if operand in centered)
    module = CodedInput(body, backward_body, len(wide), bits, places, parts)
    with gm.graph.inserting_before(nodes[-1]):
        path = free_path(gm, owner_path(nodes[-1]), snake_case(CodedInput))
        call = insert_call(gm, path, module, operands, like=nodes[-1])
    call.meta["val"] = nodes[-1].meta["val"]
    call.meta[SCOPES] = scopes_around(nodes)
    nodes[-1].replace_all_uses_with(call)
    for node in reversed(nodes):
        gm.graph.erase_node(node)


def is_float(node: fx.Node) -> bool:
    """Whether a node's value is a floating tensor."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _ghost(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
    return node if can_be_ghost(module) else None


def side_blocks(gm: fx.GraphModule) -> list[tuple[fx.Node, ...]]:
    """The runs of nodes that the blocks of the side branch are made of."""
    runs: dict[str, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        for path, kind in module_stack(node):
            if kind is LiteSideBlock:
                runs.setdefault(path, []).append(node)
    return [tuple(nodes) for nodes in runs.values() if len(nodes) > 1]
