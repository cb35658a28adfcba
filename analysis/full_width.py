"""What a compressed graph still keeps at full width: no operator is skipped silently."""

from collections.abc import Sequence

from torch import fx

from s2a_fx.analysis.saved import SavedTensor, is_activation
from s2a_fx.graph.metadata import Note, record_of

_CODED = ("codes", "ranges", "range", "rstd", "shift", "mask", "dropout_mask")
"""What the operators and modules of this package call what they code."""


def full_width_notes(gm: fx.GraphModule, rows: Sequence[SavedTensor]) -> tuple[Note, ...]:
    """A note for each tensor that is kept at full width though the graph is compressed; none for other graphs."""
    record = record_of(gm)
    if record.report_from is None:
        return ()
    wide = [row for row in rows if is_activation(row) and row.bytes >= record.report_from and not _is_code(row)]
    return tuple(Note("CompressActivations", row.node, _reason(row)) for row in wide)


def _reason(row: SavedTensor) -> str:
    return f"{row.operand} kept at full width: no form serves {row.op}, or its codes take as much"


def _is_code(row: SavedTensor) -> bool:
    owner, _, name = row.operand.rpartition(".")
    return "Backward" not in owner and name in _CODED  # autograd's own nodes are called ...Backward0
