"""Augmented assignments as plain operators, where nobody sees the difference.

    before  y = iadd(x, z)      writes to x
    after   y = add(x, z)

Passes may then read x later than the model did. Leaves alone: a tensor that is read again after the write, through whatever name or
view, and the model's inputs, parameters and buffers.
"""

from typing import Any

import torch
from torch import fx

from s2a_fx.graph.spellings import ASSIGNMENTS
from s2a_fx.graph.torch_internals import storage_key


def replace_assignments(gm: fx.GraphModule) -> None:
    """Make a plain operator of each augmented assignment whose write nobody sees; nodes know their fake values."""
    order = {node: index for index, node in enumerate(gm.graph.nodes)}
    sharing: dict[int, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if isinstance(value := node.meta.get("val"), torch.Tensor):
            sharing.setdefault(storage_key(value), []).append(node)
    for node in gm.graph.nodes:
        plain = ASSIGNMENTS.get(node.target) if node.op == "call_function" else None  # type: ignore[arg-type]
        if plain is not None and not _is_seen(node, sharing, order):
            node.target = plain
            node.meta.pop("val", None)


def _is_seen(assignment: fx.Node, sharing: dict[int, list[fx.Node]], order: dict[fx.Node, int]) -> bool:
    written: Any = assignment.args[0]
    value = written.meta.get("val") if isinstance(written, fx.Node) else None
    if not isinstance(value, torch.Tensor):
        return False  # a number, which nothing writes to
    before = [node for node in sharing[storage_key(value)] if order[node] < order[assignment]]
    if any(node.op in ("placeholder", "get_attr") for node in before) or value.dtype != assignment.meta["val"].dtype:
        return True
    return any(order[user] > order[assignment] for node in before for user in node.users)
