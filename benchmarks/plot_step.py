"""Draw what step.py wrote: the peak of a step against its time, one panel a backbone.

    python benchmarks/plot_step.py [benchmarks/results/step_*.json] [--output step.svg step.png]

Down and left is better.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

RESULTS = Path(__file__).parent / "results"
KINDS = {
    "s2a_fx, compressed": ("#c03a2b", "o"),
    "s2a_fx, exact": ("#b36b00", "o"),
    "checkpoint": ("#1f5fa8", "s"),
    "plain": ("#555555", "D"),
}
PLACES = (
    (7, 0),
    (-7, 0),
    (0, 8),
    (0, -8),
    (6, 7),
    (6, -7),
    (-6, 7),
    (-6, -7),
    (0, 20),
    (0, -20),
    (14, 18),
    (14, -18),
    (-14, 18),
    (-14, -18),
    (0, 32),
    (0, -32),
)
"""Where a label may stand, in points from its marker, best first."""

LEADER = {"arrowstyle": "-", "color": "#777777", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 3}


def kind_of(method: str) -> str:
    if method.endswith("+checkpoint"):
        return "checkpoint"
    if method in ("full", "linear", "bias", "lora", "peft-lora"):
        return "plain"
    return "s2a_fx, compressed" if method.startswith("s2a") else "s2a_fx, exact"


def draw(axes: Axes, model: str, rows: list[dict[str, Any]]) -> None:
    points = {r["method"]: (r["memory"]["peak_measured"] / 1e6, r["time_over_full"]) for r in rows}
    for method, (x, y) in points.items():
        color, marker = KINDS[kind_of(method)]
        axes.plot(x, y, marker, color=color, markersize=6, zorder=3)
    axes.margins(0.16)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.axhline(1, color="#dddddd", linewidth=0.8, zorder=0)
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(model, fontsize=10)
    axes.set_xlabel(f"peak of a training step, MB (batch {rows[0]['peak_batch_size']})")
    axes.set_ylabel(f"time of a step ÷ full (batch {rows[0]['batch_size']})")


def label(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Name each point where the name covers no other name, no point, and stays inside."""
    figure = axes.figure
    figure.canvas.draw()
    points = {r["method"]: axes.transData.transform((r["memory"]["peak_measured"] / 1e6, r["time_over_full"])) for r in rows}
    taken = [Bbox.from_bounds(x - 7, y - 7, 14, 14) for x, y in points.values()]
    for method, (x, y) in sorted(points.items(), key=lambda item: -item[1][1]):
        for dx, dy in PLACES:
            text = axes.annotate(
                method,
                axes.transData.inverted().transform((x, y)),
                (dx, dy),
                textcoords="offset points",
                fontsize=8,
                color=KINDS[kind_of(method)][0],
                ha="center" if dx == 0 else "left" if dx > 0 else "right",
                va="center" if dy == 0 else "bottom" if dy > 0 else "top",
                arrowprops=LEADER if max(abs(dx), abs(dy)) > 8 else None,
            )
            box = Bbox.from_extents(*_text_box(text))
            inside = axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1 + 10 and axes.bbox.y0 < box.y0 and box.y1 < axes.bbox.y1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()
        else:
            print(f"{method}: no room for its label")


def _text_box(text: Any) -> tuple[float, float, float, float]:
    """The box of the words alone; that of an annotation would reach to its point."""
    text.update_positions(text.figure.canvas.get_renderer())
    box = matplotlib.text.Text.get_window_extent(text)
    return box.x0, box.y0, box.x1, box.y1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "json", type=Path, nargs="*", default=[RESULTS / f"step_{name}.json" for name in ("vit", "swin", "convnext")]
    )
    parser.add_argument("--output", type=Path, nargs="+", default=[RESULTS / "step.svg", RESULTS / "step.png"])
    options = parser.parse_args()
    records = [json.loads(path.read_text()) for path in options.json]
    record = records[0]  # one machine and one setting: the title is its
    panels: dict[str, list[dict[str, Any]]] = {}
    for row in [row for each in records for row in each["figures"]["rows"]]:
        if row["memory"]["peak_measured"] and row["time_over_full"]:
            panels.setdefault(row["model"], []).append(row)
    if not panels:
        raise SystemExit("no JSON has a row with both a peak and a time over full's; run step.py with full and both.")
    plt.rcParams["svg.hashsalt"] = "step"  # the same figures give the same file
    columns = min(len(panels), 2)
    lines = -(-len(panels) // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(5.6 * columns, 4.2 * lines), squeeze=False, layout="constrained", dpi=144)
    for axes, (model, rows) in zip(grid.flat, panels.items(), strict=False):
        draw(axes, model, rows)
    for axes in list(grid.flat)[len(panels) :]:
        axes.remove()
    present = {kind_of(row["method"]) for rows in panels.values() for row in rows}
    handles = [plt.Line2D([], [], color=c, marker=m, linestyle="", label=k) for k, (c, m) in KINDS.items() if k in present]
    setting = record["figures"]["setting"]
    precision = "autocast to bfloat16" if setting["amp"] else setting["dtype"]
    title = f"Training step, AdamW, {precision}; {record['device']}; torch {record['versions']['torch']}"
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.canvas.draw()  # the layout stands from here on: labels are placed in it
    figure.set_layout_engine("none")
    for axes, rows in zip(grid.flat, panels.values(), strict=False):
        label(axes, rows)
    for path in options.output:
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        print(path)


if __name__ == "__main__":
    main()
