"""Which of many cases run at every change; the others run with the slow tests."""

from collections.abc import Iterable
from typing import Any

import pytest


def fast(cases: Iterable[Any], *chosen: Any) -> list[Any]:
    """The cases, those that are not chosen marked slow."""
    return [case if case in chosen else pytest.param(case, marks=pytest.mark.slow) for case in cases]
