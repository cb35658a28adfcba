"""Which commit a benchmark's figures are of."""

import importlib.util
import subprocess
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_the_commit_is_told_or_found_or_none(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("record", BENCHMARKS / "record.py")
    record = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(record)
    monkeypatch.setenv("S2A_FX_COMMIT", "told")
    assert record.commit() == "told"
    monkeypatch.delenv("S2A_FX_COMMIT")
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert record.commit() is None

    def found(asked, **options):
        return subprocess.CompletedProcess(asked, 0, "0123abcd\n")

    monkeypatch.setattr(record.subprocess, "run", found)
    assert record.commit() == "0123abcd"
