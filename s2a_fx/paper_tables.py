"""The paper's tables, ours beside its figures: every cell computed that can be, and a verdict on each."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate

from s2a_fx.analysis.paper import paper_bytes
from s2a_fx.analysis.peak import peak, timeline
from s2a_fx.analysis.saved import is_activation, saved_tensors
from s2a_fx.analysis.simulation import simulate
from s2a_fx.errors import PassError
from s2a_fx.fork_map import fork_map
from s2a_fx.graph.capture import trace
from s2a_fx.graph.heads import head_paths
from s2a_fx.graph.metadata import base_parameters
from s2a_fx.paper_figures import (
    ACCURACIES,
    BACKBONES,
    BATCH_SIZE,
    CLASSES,
    MEGABYTES,
    MILLIONS,
    PERCENT,
    REASONS,
    TABLES,
    Row,
    Setting,
)
from s2a_fx.recipes import RECIPES
from s2a_fx.report import Refusal
from s2a_fx.transform import transform
from s2a_fx.zoo import timm_model

KEPT, PEAK = "kept MB", "peak MB"
COMPUTED = (PERCENT, MILLIONS, MEGABYTES, KEPT, PEAK)


@dataclass(frozen=True)
class Cell:
    """One figure, ours and the paper's; None where there is none.

    `verdict`: `reproduced` (parameters to the paper's digits, rounded or cut off; memory within .5 %), `near` (within 5 %), `off`,
    `quoted` (the paper's alone: accuracies), or `computed` (ours alone).
    """

    table: int
    backbone: str
    method: str
    column: str
    ours: float | None
    paper: float | None
    verdict: str


def paper_cells(tables: Sequence[int], jobs: int = 1) -> tuple[Cell, ...]:
    """All cells of the paper's tables with these numbers, 5 for Figure 5; computed on `jobs` processes."""
    rows = [row for number in tables for row in TABLES[number]]
    names = {called: name for name, called in BACKBONES.items()}
    computed = fork_map(lambda row: _computed(row, names[row.backbone]), rows, jobs)
    return tuple(cell for row, ours in zip(rows, computed, strict=True) for cell in _cells(row, ours))


def method_cells(name: str, batch_size: int, jobs: int = 1) -> tuple[tuple[Cell, ...], tuple[Refusal, ...]]:
    """Table 1's columns for every recipe on a timm model that the paper has no figures for; and the recipes that do not fit it."""
    rows = [Row(1, name, recipe, {}, Setting(passes)) for recipe, passes in RECIPES.items()]

    def computed(row: Row) -> dict[str, float] | Refusal:
        try:
            return _computed(row, name, batch_size)
        except PassError as error:
            return Refusal(row.method, str(error))

    results = fork_map(computed, rows, jobs)
    cells = [cell for row, ours in zip(rows, results, strict=True) if isinstance(ours, dict) for cell in _cells(row, ours)]
    return tuple(cells), tuple(r for r in results if isinstance(r, Refusal))


def _computed(row: Row, name: str, batch_size: int = BATCH_SIZE) -> dict[str, float]:
    """Our figures of a row: its parameters by the paper's rule, its memory by the paper's count, by autograd's, and at the peak."""
    model, example = timm_model(name, num_classes=CLASSES, batch_size=batch_size)
    gm = transform(model, example, row.setting.recipe)
    counted = row.setting.counts(gm)
    whole = base_parameters(gm)
    record = simulate(gm)
    saved = sum(r.bytes for r in saved_tensors(gm, record) if is_activation(r))
    weights = sum(p.numel() * p.element_size() for p in gm.parameters())
    heads = head_paths(trace(model, example))
    head = sum(p.numel() for path, p in model.named_parameters() if path.rpartition(".")[0] in heads)
    return {
        PERCENT: 100 * counted / (whole if counted == whole else whole - head),
        MILLIONS: counted / 1e6,
        MEGABYTES: paper_bytes(gm) / 1e6,
        KEPT: (weights + saved) / 1e6,
        PEAK: peak(timeline(gm, record)).bytes / 1e6,
    }


def _cells(row: Row, ours: dict[str, float]) -> list[Cell]:
    cells = []
    for column in (*COMPUTED, *ACCURACIES):
        figure = row.figures.get(column)
        value = None if column not in ours else round(ours[column], 4)
        if value is not None or figure is not None:
            paper = None if figure is None else float(figure)
            cells.append(Cell(row.table, row.backbone, row.method, column, value, paper, _verdict(column, value, figure)))
    return cells


def _verdict(column: str, ours: float | None, figure: str | None) -> str:
    if figure is None:
        return "computed"
    if ours is None:
        return "quoted"
    paper = float(figure)
    if column == MEGABYTES:
        same = abs(ours / paper - 1) <= 0.005
    else:
        unit = 10.0 ** -len(figure.partition(".")[2])
        same = paper in (round(round(ours / unit) * unit, 6), round(math.floor(ours / unit) * unit, 6))
    if same:
        return "reproduced"
    return "near" if abs(ours / paper - 1) <= 0.05 else "off"


def to_json(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """The cells as plain data."""
    return [asdict(cell) for cell in cells]


def to_text(cells: Sequence[Cell]) -> str:
    """The tables: ours, the paper's figure in brackets, a mark where it is not reproduced, and why."""
    numbers = dict.fromkeys(cell.table for cell in cells)
    parts = [_table(number, [cell for cell in cells if cell.table == number]) for number in numbers]
    return "\n\n".join([*parts, _legend(cells)])


_MARKS = {"reproduced": "", "near": " ~", "off": " !", "computed": "", "quoted": ""}


def _table(number: int, cells: list[Cell]) -> str:
    quoted = [c for c in ACCURACIES if any(cell.column == c for cell in cells)]
    columns = [c for c in COMPUTED if any(cell.column == c and (c != MILLIONS or cell.paper or number == 5) for cell in cells)]
    rows: dict[tuple[str, str], dict[str, Cell]] = {}
    for cell in cells:
        rows.setdefault((cell.backbone, cell.method), {})[cell.column] = cell
    lines = [(*key, *(_shown(row.get(c)) for c in columns), *(_shown(row.get(c)) for c in quoted)) for key, row in rows.items()]
    headers = ("backbone", "method", *columns, *(f"{c} *" for c in quoted))
    of_paper = f"{f'Table {number}' if number < 5 else 'Figure 5'} of the paper"
    title = of_paper if cells[0].backbone in BACKBONES.values() else "The methods on another model"
    align = ("left", "left", *["right"] * (len(headers) - 2))
    return f"{title}\n{tabulate(lines, headers, disable_numparse=True, colalign=align)}"


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return ""
    if cell.ours is None:
        return f"{cell.paper:.2f}"
    digits = 1 if cell.column in (MEGABYTES, KEPT, PEAK) else 2 if cell.column == MILLIONS else 3
    ours = f"{cell.ours:,.{digits}f}"
    return ours if cell.paper is None else f"{ours} ({cell.paper:g}){_MARKS[cell.verdict]}"


def _legend(cells: Sequence[Cell]) -> str:
    memory = (
        f"{MEGABYTES}: the paper's count, over leaf modules   {KEPT}: weights and all that autograd keeps   {PEAK}: the AdamW step"
    )
    compared = [cell for cell in cells if cell.ours is not None and cell.paper is not None]
    if not compared:
        return memory
    counts = ", ".join(f"{sum(c.verdict == v for c in compared)} {v}" for v in ("reproduced", "near", "off"))
    lines = [
        f"{len(compared)} figures set against the paper's, in brackets: {counts}.",
        "~ near (within 5 %)   ! off   * the paper's own, not measured here",
        memory,
    ]
    return "\n".join([*lines, *(_missed(cell) for cell in compared if cell.verdict != "reproduced")])


def _missed(cell: Cell) -> str:
    assert cell.ours is not None and cell.paper is not None
    reason = REASONS.get((cell.backbone, cell.method, cell.column), "")
    return f"- {cell.backbone}, {cell.method}, {cell.column}: {100 * (cell.ours / cell.paper - 1):+.1f} %. {reason}"
