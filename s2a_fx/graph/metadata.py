"""All that is written on a graph module, in one record that survives `copy.deepcopy` and pickling."""

from dataclasses import dataclass

from torch import fx, nn

from s2a_fx.graph import torch_internals
from s2a_fx.graph.inputs import Signature

_KEY = "s2a_fx"


@dataclass(frozen=True)
class Note:
    """One decision: `source` (a pass or the tracer), the `node` (empty: the whole graph), and the `reason`."""

    source: str
    node: str
    reason: str


@dataclass
class GraphRecord:
    """What is known of a graph beside its nodes.

    Attributes:
        base_parameters: how many parameters the model had before any pass.
        signature: how the model is called; None for a graph that `trace` did not make.
        non_persistent: paths of the buffers that the model leaves out of its state dict.
        notes: what passes did or left alone, and why; the report prints them.
        report_from: report every saved tensor of at least so many bytes that is not coded; None where nothing is compressed.
    """

    base_parameters: int
    signature: Signature | None = None
    non_persistent: tuple[str, ...] = ()
    notes: tuple[Note, ...] = ()
    report_from: int | None = None


def record_of(gm: fx.GraphModule) -> GraphRecord:
    """The record of a graph module, which it gets now if it has none."""
    if _KEY not in gm.meta:
        gm.meta[_KEY] = GraphRecord(sum(p.numel() for p in gm.parameters()))
    return gm.meta[_KEY]  # type: ignore[no-any-return]


def start_record(gm: fx.GraphModule, model: nn.Module, signature: Signature) -> None:
    """Write a new record on a graph that was captured from `model`."""
    gm.meta[_KEY] = GraphRecord(
        sum(p.numel() for p in model.parameters()), signature, torch_internals.non_persistent_buffers(model)
    )
    leave_out_non_persistent(gm)
    torch_internals.call_after_deepcopy(gm, leave_out_non_persistent)


def signature_of(module: nn.Module) -> Signature | None:
    """How a graph module that `trace` made is called; None for any other module."""
    return record_of(module).signature if isinstance(module, fx.GraphModule) else None


def leave_out_non_persistent(gm: fx.GraphModule) -> None:
    """Leave out of the graph's state dict what the model leaves out of its own: torch 2.11 lets a graph save all buffers."""
    torch_internals.make_non_persistent(gm, record_of(gm).non_persistent)


def base_parameters(gm: fx.GraphModule) -> int:
    """How many parameters the model had before any pass."""
    return record_of(gm).base_parameters


def add_note(gm: fx.GraphModule, source: str, node: str, reason: str) -> None:
    """Attach a note to the graph."""
    record = record_of(gm)
    record.notes = (*record.notes, Note(source, node, reason))


def notes_of(gm: fx.GraphModule) -> tuple[Note, ...]:
    """All notes on the graph, oldest first."""
    return record_of(gm).notes
