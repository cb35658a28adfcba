"""All that is written on a graph module, in one record that survives `copy.deepcopy` and pickling."""

from dataclasses import dataclass

from torch import fx, nn

from s2a_fx.graph.inputs import Signature
from s2a_fx.graph.model_attributes import Skeleton, answer_as, copy_attributes

_KEY = "s2a_fx"


@dataclass(frozen=True)
class Note:
    """One decision: `source` (a pass or the tracer), the `node` (empty: the whole graph), and the `reason`."""

    source: str
    node: str
    reason: str


@dataclass(frozen=True)
class Origin:
    """The model's name, each pass with all its options, in the order in which they were applied, and the parameters that they left
    trainable, by name."""

    model: str
    passes: tuple[str, ...]
    trained: tuple[str, ...]


@dataclass
class GraphRecord:
    """What is known of a graph beside its nodes.

    Attributes:
        base_parameters: how many parameters the model had before any pass.
        signature: how the model is called; None for a graph that `trace` did not make.
        skeleton: the model without its weights; None for a graph that `trace` did not make.
        attributes: the names of the plain attributes that the graph module has from the model.
        notes: what passes did or left alone, and why; the report prints them.
        report_from: report every saved tensor of at least so many bytes that is not coded; None where nothing is compressed.
        origin: the model and the passes that made the graph; None before `transform`.
    """

    base_parameters: int
    signature: Signature | None = None
    skeleton: Skeleton | None = None
    attributes: tuple[str, ...] = ()
    notes: tuple[Note, ...] = ()
    report_from: int | None = None
    origin: Origin | None = None


def record_of(gm: fx.GraphModule) -> GraphRecord:
    """The record of a graph module, which it gets now if it has none."""
    if _KEY not in gm.meta:
        gm.meta[_KEY] = GraphRecord(sum(p.numel() for p in gm.parameters()))
    return gm.meta[_KEY]  # type: ignore[no-any-return]


def find_record(module: nn.Module) -> GraphRecord | None:
    """The record of a graph module that has one; None for any other module."""
    return module.meta.get(_KEY) if isinstance(module, fx.GraphModule) else None


def start_record(gm: fx.GraphModule, skeleton: Skeleton, signature: Signature) -> None:
    """Write a new record on a captured graph, and give it what callers read of the model."""
    base = sum(p.numel() for p in gm.parameters())
    gm.meta[_KEY] = GraphRecord(base, signature, skeleton, copy_attributes(gm, skeleton))
    answer_as_model(gm)


def answer_as_model(gm: fx.GraphModule) -> None:
    """Let the class of a graph module, which is that of no other, answer as the model's (see `model_attributes.py`)."""
    record = find_record(gm)
    if record is not None and record.skeleton is not None:
        answer_as(gm, record.skeleton)


def signature_of(module: nn.Module) -> Signature | None:
    """How a graph module that `trace` made is called; None for any other module."""
    record = find_record(module)
    return None if record is None else record.signature


def base_parameters(gm: fx.GraphModule) -> int:
    """How many parameters the model had before any pass."""
    record = find_record(gm)
    return sum(p.numel() for p in gm.parameters()) if record is None else record.base_parameters


def add_note(gm: fx.GraphModule, source: str, node: str, reason: str) -> None:
    """Attach a note to the graph."""
    record = record_of(gm)
    record.notes = (*record.notes, Note(source, node, reason))


def notes_of(gm: fx.GraphModule) -> tuple[Note, ...]:
    """All notes on the graph, oldest first."""
    record = find_record(gm)
    return () if record is None else record.notes
