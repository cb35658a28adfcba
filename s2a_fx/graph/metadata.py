"""What a pass did or left alone, and why: data on the graph module, which the report prints."""

from dataclasses import dataclass

from torch import fx

_KEY = "s2a_fx.notes"


@dataclass(frozen=True)
class Note:
    """One decision: `source` (a pass or the tracer), the `node` (empty: the whole graph), and the `reason`."""

    source: str
    node: str
    reason: str


def add_note(gm: fx.GraphModule, source: str, node: str, reason: str) -> None:
    """Attach a note to the graph; notes survive `deepcopy` and pickling."""
    gm.meta[_KEY] = (*notes_of(gm), Note(source, node, reason))


def notes_of(gm: fx.GraphModule) -> tuple[Note, ...]:
    """All notes on the graph, oldest first."""
    return tuple(gm.meta.get(_KEY, ()))
