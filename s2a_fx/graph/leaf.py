"""What a leaf does that is no operator of torch's: the ATen calls of a run on fake tensors.

timm's window_reverse      view, permute, clone, view       it only rearranges
a model's own DropPath     new_empty, bernoulli_, mul       it draws, drops and scales
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from s2a_fx.graph.calls import canonical
from s2a_fx.graph.regions import modules_within
from s2a_fx.graph.shapes import compute
from s2a_fx.graph.torch_internals import Schema, TorchDispatchMode, schema_of

_COPIES = (torch.clone, torch.reshape, torch.roll)
_DROPPING = (
    torch.rand, torch.rand_like, torch.bernoulli, torch.empty, torch.empty_like, torch.Tensor.new_empty,
    torch.add, torch.sub, torch.mul, torch.div, torch.floor,
)  # fmt: skip


class LeafCalls(TorchDispatchMode):
    """Writes down the ATen calls of a run, and whether one draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.schemas: list[Schema] = []
        self.operators: list[Any] = []
        self.draws = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func.namespace == "prim":  # asks for a tensor's device, and computes nothing
            return func(*args, **(kwargs or {}))
        schema = schema_of(func)
        self.schemas.append(schema)
        self.operators.append(canonical(func))
        given = {**dict(zip((p.name for p in schema.parameters), args, strict=False)), **(kwargs or {})}
        self.draws |= schema.draws and given.get("dropout_p") != 0  # a fused attention says so, and draws none without
        return func(*args, **(kwargs or {}))


def leaf_calls(gm: fx.GraphModule, node: fx.Node) -> LeafCalls | None:
    """What a node runs in train mode; None where it does not run on fake tensors, or its operands have no values."""
    if any("val" not in operand.meta for operand in node.all_input_nodes):
        return None
    module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
    calls = LeafCalls()
    try:
        with _training(module):
            compute(gm, node, calls)
    except Exception:  # a leaf is anybody's code
        return None
    return calls


def only_rearranges(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a leaf returns elements of its operand in another order, and computes nothing of them."""
    calls = leaf_calls(gm, node)
    if calls is None or not calls.operators:
        return False
    steps = zip(calls.schemas, calls.operators, strict=True)
    return all(operator in _COPIES or any(p.is_shown and not p.is_written for p in s.parameters[:1]) for s, operator in steps)


def only_drops(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a leaf draws what it drops of its operand, scales the rest, and does no more."""
    calls = leaf_calls(gm, node)
    return calls is not None and calls.draws and all(operator in _DROPPING for operator in calls.operators)


@contextmanager
def _training(module: nn.Module | None) -> Iterator[None]:
    """Inside, a module and those within train."""
    modes = [] if module is None else [(m, m.training) for m in modules_within(module)]
    try:
        for m, _ in modes:
            m.training = True
        yield
    finally:
        for m, mode in modes:
            m.training = mode
