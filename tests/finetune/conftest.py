"""The data set of these tests, and a run on it that nothing disturbed."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from colours import small_run, write_colours

from s2a_fx.finetune import FinetuneResult, finetune


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_colours(tmp_path_factory.mktemp("data") / "colours")


@pytest.fixture(scope="session")
def whole_run(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[FinetuneResult, list[str]]:
    lines: list[str] = []
    return finetune(small_run(colours, tmp_path_factory.mktemp("whole") / "run"), lines.append), lines
