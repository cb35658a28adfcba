"""The timeline of a training step: live bytes by kind, and where they stand highest."""

from dataclasses import dataclass

from torch import fx

from s2a_fx.analysis.ledger import Place, StepRecord
from s2a_fx.graph.provenance import module_path

KINDS = ("parameter", "buffer", "gradient", "optimizer", "input", "saved", "temporary")


@dataclass(frozen=True)
class Moment:
    """The worst moment while one graph node is at work.

    Attributes:
        phase: forward, loss, backward or optimizer.
        node: the graph node, in the backward the one whose gradient is computed; empty outside the graph.
        module: the node's module path.
        op: the operator that made the last allocation.
        bytes_by_kind: live bytes of each of `KINDS`, in that order.
    """

    phase: str
    node: str
    module: str
    op: str
    bytes_by_kind: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return sum(self.bytes_by_kind)

    def of(self, kind: str) -> int:
        """Live bytes of one kind."""
        return self.bytes_by_kind[KINDS.index(kind)]


def timeline(gm: fx.GraphModule, record: StepRecord) -> tuple[Moment, ...]:
    """One moment for each stretch of the simulated step in which a node of `gm` is at work, in order of time."""
    modules = {node.name: module_path(node) for node in gm.graph.nodes}
    live = [0] * len(KINDS)
    column = [KINDS.index(storage.kind) for storage in record.storages]
    moments: list[Moment] = []
    previous: Place | None = None
    for event in record.events:
        live[column[event.storage]] += event.bytes
        place = event.place
        same = previous is not None and (previous.phase, previous.node) == (place.phase, place.node)
        if same and sum(live) <= moments[-1].bytes:
            continue
        moment = Moment(place.phase, place.node, modules.get(place.node, ""), place.op, tuple(live))
        if same:
            moments[-1] = moment
        else:
            moments.append(moment)
        previous = place
    return tuple(moments)


def peak(moments: tuple[Moment, ...]) -> Moment:
    """The moment with the most live bytes; the first of equals."""
    return max(moments, key=lambda moment: moment.bytes)
