"""Reports: records made by the analyses, set as tables and JSON. Computes nothing that the records do not hold.

Sizes are printed in MB = 10^6 bytes.
"""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from s2a_fx.analysis.peak import KINDS, Moment
from s2a_fx.analysis.saved import SavedTensor, is_activation
from s2a_fx.graph.metadata import Note

MB = 10**6


@dataclass(frozen=True)
class MemoryReport:
    """What one training step of a model keeps and peaks at.

    Attributes:
        model: the model's class or given name.
        recipe: the recipe's name; `as given` for a model that was analysed as it came.
        batch_size: first dimension of the first input.
        image_size: (H, W) of the first input, or its other dimensions.
        dtype: of the parameters.
        optimizer, device: what was simulated.
        parameters, trainable_parameters: element counts after rewriting.
        trainable_percent: trainable parameters in percent of the original model's parameters.
        weight_bytes: bytes of all parameters.
        kept_bytes: weights and saved tensors.
        saved_bytes: what autograd keeps at the end of the forward, each storage once, parameters and buffers left out.
        peak_bytes: the most bytes alive at once in the step, everything counted.
        paper_bytes: the paper's own count (see `s2a_fx.analysis.paper`).
        peak: the moment of the peak.
        timeline: the whole step, a moment for each graph node at work.
        saved: one row a storage, parameters and buffers included and told apart by `kind`.
        notes: what passes left alone, and why.
        assumptions: what the simulation takes for granted.
    """

    model: str
    recipe: str
    batch_size: int
    image_size: tuple[int, ...]
    dtype: str
    optimizer: str
    device: str
    parameters: int
    trainable_parameters: int
    trainable_percent: float
    weight_bytes: int
    saved_bytes: int
    paper_bytes: int
    peak: Moment
    timeline: tuple[Moment, ...]
    saved: tuple[SavedTensor, ...]
    notes: tuple[Note, ...]
    assumptions: tuple[str, ...]

    @property
    def kept_bytes(self) -> int:
        return self.weight_bytes + self.saved_bytes

    @property
    def peak_bytes(self) -> int:
        return self.peak.bytes

    @property
    def activations(self) -> tuple[SavedTensor, ...]:
        """The rows that count as saved bytes."""
        return tuple(row for row in self.saved if is_activation(row))

    def __str__(self) -> str:
        return self.text()

    def title(self) -> str:
        """One line: what was simulated."""
        size = " x ".join(str(side) for side in self.image_size)
        return f"{self.model}: batch {self.batch_size}, {size} px, {self.dtype}, {self.optimizer}, {self.device}"

    def table(self, fold: bool = True) -> str:
        """What autograd keeps, a row for each saved tensor; folded, those alike in all blocks are joined, and so are small ones."""
        return _folded_table(self.activations) if fold else _whole_table(self.activations)

    def totals(self) -> str:
        """Saved bytes by operator, the largest first; those of less than a thousandth are joined."""
        of_each: Counter[str] = Counter()
        for row in self.activations:
            of_each[row.op] += row.bytes
        by_op: Counter[str] = Counter()
        for op, size in of_each.items():
            by_op[op if size >= self.saved_bytes / 1000 else "(others)"] += size
        lines = [(op, _mb(size), f"{100 * size / max(self.saved_bytes, 1):.1f}") for op, size in by_op.most_common()]
        return tabulate(lines, ("op", "MB", "%"), disable_numparse=True, colalign=("left", "right", "right"))

    def peak_table(self) -> str:
        """What stands at the peak, by kind."""
        lines = [(kind, _mb(self.peak.of(kind))) for kind in KINDS if self.peak.of(kind)]
        return tabulate([*lines, ("all", _mb(self.peak_bytes))], ("kind", "MB"), disable_numparse=True, colalign=("left", "right"))

    def text(self, fold: bool = True) -> str:
        """The whole report."""
        parts = [
            f"What autograd keeps, {self.recipe}: {_mb(self.saved_bytes)} MB",
            self.table(fold),
            f"\nBy operator\n{self.totals()}",
            f"\nPeak of the step: {_mb(self.peak_bytes)} MB, {_stands_at(self.peak)}",
            self.peak_table(),
        ]
        if self.notes:
            parts.append("\nLeft alone\n" + _note_table(self.notes))
        parts.append("\nAssumptions\n" + "\n".join(f"- {line}" for line in self.assumptions))
        return "\n".join(parts)

    def to_json(self) -> dict[str, Any]:
        """The figures of this recipe, as plain data; bytes are integers."""
        return {
            "parameters": self.parameters,
            "trainable_parameters": self.trainable_parameters,
            "trainable_percent": self.trainable_percent,
            "weight_bytes": self.weight_bytes,
            "saved_bytes": self.saved_bytes,
            "kept_bytes": self.kept_bytes,
            "peak_bytes": self.peak_bytes,
            "paper_bytes": self.paper_bytes,
            "peak": {"phase": self.peak.phase, "node": self.peak.node, "op": self.peak.op},
            "nodes": [_row_json(row) for row in self.activations],
            "notes": [{"source": n.source, "node": n.node, "reason": n.reason} for n in self.notes],
            "assumptions": list(self.assumptions),
        }


@dataclass(frozen=True)
class Refusal:
    """A recipe that does not fit the model, and why."""

    recipe: str
    reason: str

    def __str__(self) -> str:
        return f"{self.recipe} does not fit: {self.reason}"


@dataclass(frozen=True)
class Comparison:
    """Reports of one model under several recipes, and the recipes that do not fit it."""

    reports: tuple[MemoryReport, ...]
    refusals: tuple[Refusal, ...] = ()

    def __getitem__(self, recipe: str) -> MemoryReport:
        """The report of a recipe, by name."""
        for report in self.reports:
            if report.recipe == recipe:
                return report
        raise KeyError(recipe)

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """One row a recipe; the last two columns set saved bytes and peak against the first recipe's."""
        base = self.reports[0]
        lines = [
            (
                r.recipe,
                f"{r.trainable_parameters / 1e6:.2f} M",
                f"{r.trainable_percent:.2f}",
                _mb(r.saved_bytes),
                _mb(r.kept_bytes),
                _mb(r.peak_bytes),
                _ratio(r.saved_bytes, base.saved_bytes),
                _ratio(r.peak_bytes, base.peak_bytes),
                _mb(r.paper_bytes),
                _stands_at(r.peak),
            )
            for r in self.reports
        ]
        versus = base.recipe
        headers = (
            "recipe", "trained", "%", "saved MB", "kept MB", "peak MB",
            f"saved / {versus}", f"peak / {versus}", "paper MB", "the peak stands at",
        )  # fmt: skip
        table = tabulate(lines, headers, disable_numparse=True, colalign=("left", *["right"] * 8, "left"))
        return "\n".join([table, *map(str, self.refusals)])

    def to_json(self) -> dict[str, Any]:
        """All figures as plain data: what was simulated, and `recipes` by name."""
        first = self.reports[0]
        return {
            "model": first.model,
            "batch_size": first.batch_size,
            "image_size": list(first.image_size),
            "dtype": first.dtype,
            "optimizer": first.optimizer,
            "device": first.device,
            "recipes": {report.recipe: report.to_json() for report in self.reports},
            "refusals": {refusal.recipe: refusal.reason for refusal in self.refusals},
        }


def _mb(size: int) -> str:
    return f"{size / MB:,.1f}"


def _ratio(size: int, base: int) -> str:
    return f"{size / base:.3f}" if base else "-"


def _stands_at(moment: Moment) -> str:
    place = f"{moment.phase} of {moment.module or moment.node}" if moment.node else moment.phase
    return f"{place} ({moment.op})"


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(str(side) for side in shape)


def _dtype(row: SavedTensor) -> str:
    return str(row.dtype).removeprefix("torch.")


def _whole_table(rows: tuple[SavedTensor, ...]) -> str:
    lines = [
        (r.node, r.op, r.module, r.operand, _shape(r.shape), _dtype(r), f"{r.bytes:,}", ", ".join(map(str, r.holders)))
        for r in rows
    ]
    headers = ("node", "op", "module", "operand", "shape", "dtype", "bytes", "holders")
    return tabulate(lines, headers, disable_numparse=True, colalign=(*["left"] * 6, "right", "left"))


def _folded_table(rows: tuple[SavedTensor, ...]) -> str:
    groups: dict[tuple[str, ...], list[SavedTensor]] = {}
    for row in rows:
        others = dict.fromkeys(_any_number(h.node) for h in row.holders if h.node != row.node)
        key = (_any_number(row.module), row.op, _operands(row), _shape(row.shape), _dtype(row), ", ".join(others))
        groups.setdefault(key, []).append(row)
    lines: list[tuple[str, ...]] = []
    small: list[SavedTensor] = []
    for (module, op, operand, shape, dtype, other), members in groups.items():
        size = sum(row.bytes for row in members)
        if size < MB // 2:
            small += members
            continue
        lines.append((f"x{len(members)}" if len(members) > 1 else "", module, op, operand, shape, dtype, _mb(size), other))
    if small:
        together = _mb(sum(row.bytes for row in small))
        lines.append((f"x{len(small)}", "(small: statistics, ranges, ...)", "", "", "", "", together, ""))
    headers = ("", "module", "op", "operand", "shape", "dtype", "MB", "also held by")
    return tabulate(lines, headers, disable_numparse=True, colalign=("right", *["left"] * 5, "right", "left"))


def _operands(row: SavedTensor) -> str:
    """All operands by which the row's own node holds the storage: `attention.query, key, value`."""
    own = [h.operand for h in row.holders if h.node == row.node]
    first, *rest = dict.fromkeys(own)
    return ", ".join([first, *(operand.rpartition(".")[2] for operand in rest)])


def _any_number(name: str) -> str:
    """`blocks.3.attn` -> `blocks.*.attn`: the running numbers of a path or of a node's name."""
    return re.sub(r"(?<=[._])\d+(?=[._:]|$)", "*", name)


def _note_table(notes: tuple[Note, ...]) -> str:
    counts = Counter((n.source, re.sub(r"\d+", "*", n.node), re.sub(r"(?<=[a-z._])\d+", "*", n.reason)) for n in notes)
    lines = [(f"x{count}" if count > 1 else "", *key) for key, count in counts.items()]
    return tabulate(lines, ("", "by", "node", "reason"), disable_numparse=True, colalign=("right", "left", "left", "left"))


def _row_json(row: SavedTensor) -> dict[str, Any]:
    return {
        "node": row.node,
        "op": row.op,
        "module": row.module,
        "operand": row.operand,
        "shape": list(row.shape),
        "dtype": _dtype(row),
        "bytes": row.bytes,
        "kind": row.kind,
        "holders": [str(holder) for holder in row.holders],
        "made_at": row.made_at,
        "last_read_forward": row.last_read_forward,
        "last_read_backward": row.last_read_backward,
    }
