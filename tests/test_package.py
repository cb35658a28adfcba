"""One copy of each module in the wheel; imports in one direction."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A package may import those before it; `passes` and `analysis` stand at the root under their public names.
ORDER = [
    "errors",
    "version",
    "file_kind",
    "whole_file",
    "parent_watch",
    "cgroups",
    "usable_cores",
    "sharded",
    "graph",
    "fusion",
    "codecs",
    "ops",
    "nn",
    "analysis",
    "passes",
    "recipes",
    "tasks",
    "report",
    "zoo",
    "fork_map",
    "transform",
    "finalize",
]
ORDER += ["backend", "inductor", "html", "analyze", "paper_figures", "paper_tables", "arguments", "finetune", "cli"]


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("s2a_fx"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return found


def test_imports_go_one_way():
    for index, name in enumerate(ORDER):
        place = next(p for p in (ROOT / name, ROOT / "s2a_fx" / name, ROOT / "s2a_fx" / f"{name}.py") if p.exists())
        files = [place] if place.is_file() else list(place.rglob("*.py"))
        allowed = {*ORDER[: index + 1]}
        for file in files:
            assert _imports(file) <= allowed, f"{file.relative_to(ROOT)} imports {_imports(file) - allowed}"


def test_order_names_every_module():
    names = {p.stem for p in (ROOT / "s2a_fx").iterdir() if not p.name.startswith("__") and p.name != "py.typed"}
    assert names == set(ORDER)


@pytest.mark.slow
def test_wheel_holds_one_copy_of_each_module(tmp_path):
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = [n for n in zipfile.ZipFile(wheel).namelist() if n.endswith(".py")]
    assert "s2a_fx/passes/freeze_weights.py" in names
    assert "s2a_fx/analysis/saved.py" in names
    assert all(n.startswith("s2a_fx/") for n in names)
    assert len(names) == len(set(names))
