"""Where a benchmark's figures go: JSON with date, device, versions and command.

The commit is that of the checkout, or what `S2A_FX_COMMIT` says where there is no repository.
"""

import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import timm
import torch

RESULTS = Path(__file__).parent / "results"


def write(name: str, figures: Any, device: str = "cpu") -> Path:
    """Write `figures`, taken on `device`, to results/NAME.json with all that is needed to judge them."""
    path = RESULTS / f"{name}.json"
    record = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "commit": commit(),
        },
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "figures": figures,
    }
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def commit() -> str | None:
    """The commit that is measured, None where nothing tells."""
    told = os.environ.get("S2A_FX_COMMIT")
    if told:
        return told
    try:
        asked = ["git", "-C", str(RESULTS.parent), "rev-parse", "HEAD"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def cpu() -> str:
    """The kind of CPU, and how many threads torch uses of it."""
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
