"""What autograd keeps when the forward ends: a row for each storage, with everyone who holds it and how long it lives."""

from dataclasses import dataclass

import torch
from torch import fx

from s2a_fx.analysis.ledger import StepRecord
from s2a_fx.analysis.simulation import simulate
from s2a_fx.graph.provenance import module_path

ACTIVATION_KINDS = ("activation", "input")


@dataclass(frozen=True)
class Holder:
    """A graph node and the operand of its backward that keeps a storage, such as `GeluBackward0.self`."""

    node: str
    operand: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.node}:{self.operand}"


@dataclass(frozen=True)
class SavedTensor:
    """One storage that autograd keeps.

    Attributes:
        kind: `activation`, `input`, `parameter` or `buffer`; only the first two count as saved bytes.
        bytes: the whole storage, however small the view that is held.
        holders: everyone who keeps it, in forward order. The first gives `node`, `operand`, `shape` and `dtype`.
        made_at: the node that made it; empty for parameters, buffers and inputs.
        last_read_forward: the last node of the forward that takes it as an operand; empty if none does.
        last_read_backward: the first of the holders: backward runs in reverse, so that it is the last to need the storage.
    """

    node: str
    op: str
    module: str
    kind: str
    bytes: int
    holders: tuple[Holder, ...]
    made_at: str
    last_read_forward: str
    last_read_backward: str

    @property
    def operand(self) -> str:
        return self.holders[0].operand

    @property
    def shape(self) -> tuple[int, ...]:
        return self.holders[0].shape

    @property
    def dtype(self) -> torch.dtype:
        return self.holders[0].dtype


def saved_tensors(gm: fx.GraphModule, record: StepRecord | None = None) -> tuple[SavedTensor, ...]:
    """The storages that autograd keeps at the end of the forward of `gm`, in the order in which they are first saved.

    Args:
        gm: a traced graph.
        record: a simulation of it; left out, the forward is simulated on the CPU.
    """
    record = record or simulate(gm, forward_only=True)
    nodes = {node.name: node for node in gm.graph.nodes}
    by_storage: dict[int, list[Holder]] = {}
    for save in record.saves:
        by_storage.setdefault(save.storage, []).append(Holder(save.node, save.operand, save.shape, save.dtype))
    rows = []
    for index, holders in by_storage.items():
        storage, first = record.storages[index], nodes[holders[0].node]
        kind = storage.kind if storage.kind in ("parameter", "buffer", "input") else "activation"
        rows.append(
            SavedTensor(
                node=first.name,
                op=operator_name(gm, first),
                module=module_path(first),
                kind=kind,
                bytes=storage.bytes,
                holders=tuple(holders),
                made_at=storage.made.node,
                last_read_forward=storage.last_read,
                last_read_backward=holders[0].node,
            )
        )
    return tuple(rows)


def is_activation(row: SavedTensor) -> bool:
    """Whether a row counts towards saved bytes: it is neither a parameter nor a buffer."""
    return row.kind in ACTIVATION_KINDS


def operator_name(gm: fx.GraphModule, node: fx.Node) -> str:
    """A short name of what a node does: the module's type, the function's or the method's name."""
    if node.op == "call_module":
        return type(gm.get_submodule(str(node.target))).__name__
    if isinstance(node.target, str):
        return node.target
    return getattr(node.target, "__name__", str(node.target)).split(".")[0]
