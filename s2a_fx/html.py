"""A comparison as one self-contained page: the recipes' figures, each step's timeline, and what autograd keeps."""

from html import escape
from string import Template

from s2a_fx.analysis.peak import KINDS
from s2a_fx.report import MB, Comparison, MemoryReport

_COLOURS = ("#4c78a8", "#9ecae9", "#f58518", "#ffbf79", "#54a24b", "#b279a2", "#e45756")
_WIDTH, _HEIGHT = 900, 220
_PAGE = Template("""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>$title</title>
<style>
 body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; color: #222 }
 pre { font-size: 12px; overflow-x: auto; background: #f6f6f6; padding: .8rem }
 svg { width: 100%; height: auto; background: #fafafa }
 .key span { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 1em }
</style>
<h1>$title</h1>
<pre>$table</pre>
<p class="key">Live bytes through a training step:$key</p>
$sections
</html>
""")


def to_html(comparison: Comparison) -> str:
    """The page, with all timelines drawn to one scale."""
    top = max(report.peak_bytes for report in comparison.reports)
    key = "".join(f'<span style="background:{c}"></span>{k}' for k, c in zip(KINDS, _COLOURS, strict=True))
    return _PAGE.substitute(
        title=escape(comparison.reports[0].title()),
        table=escape(comparison.table()),
        key=key,
        sections="\n".join(_section(report, top) for report in comparison.reports),
    )


def _section(report: MemoryReport, top: int) -> str:
    return (
        f"<h2>{escape(report.recipe)}: peak {report.peak_bytes / MB:,.1f} MB</h2>\n{_timeline(report, top)}\n"
        f"<details><summary>What autograd keeps: {report.saved_bytes / MB:,.1f} MB</summary>"
        f"<pre>{escape(report.text())}</pre></details>"
    )


def _timeline(report: MemoryReport, top: int) -> str:
    """Stacked areas, one a kind; the dashed line is where the backward begins."""
    moments = report.timeline
    step = _WIDTH / max(len(moments) - 1, 1)
    below = [0] * len(moments)
    shapes = []
    for index, kind in enumerate(KINDS):
        above = [b + m.bytes_by_kind[index] for b, m in zip(below, moments, strict=True)]
        edge = [f"{i * step:.1f},{_HEIGHT * (1 - y / top):.1f}" for i, y in enumerate(above)]
        base = [f"{i * step:.1f},{_HEIGHT * (1 - y / top):.1f}" for i, y in enumerate(below)]
        points = " ".join(edge + base[::-1])
        shapes.append(f'<polygon points="{points}" fill="{_COLOURS[index]}"><title>{kind}</title></polygon>')
        below = above
    turn = next((i for i, m in enumerate(moments) if m.phase == "backward"), len(moments)) * step
    shapes.append(f'<line x1="{turn:.1f}" x2="{turn:.1f}" y1="0" y2="{_HEIGHT}" stroke="#444" stroke-dasharray="4"/>')
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="timeline">{"".join(shapes)}</svg>'
