"""What calls leave behind: growth of resident memory a call, beside what plain torch.fx leaves of the same model.

    python benchmarks/leaks.py

Each measurement runs in a process of its own and drops all results. After a warm-up, resident memory is read after every tenth
call, garbage collected; the growth is the slope of the least-squares line. The same process counts what torch.fx keeps for ever,
sources of generated code, and the modules alive.
"""

import argparse
import gc
import json
import linecache
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record
import timm
import torch
from torch import fx, nn

import s2a_fx

MODELS = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2, "num_classes": 4}),
    "resnet": ("resnet10t", {"num_classes": 4}),
}
CALLS: dict[str, tuple[int, Callable[[nn.Module, torch.Tensor], Any]]] = {
    "symbolic_trace": (300, lambda model, x: fx.symbolic_trace(model)),
    "analyze": (300, lambda model, x: s2a_fx.analyze(model, (x,))),
    "transform": (100, lambda model, x: s2a_fx.transform(model, (x,), "s2a")),
}
WARM_UP = 40
EVERY = 10


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def sources() -> int:
    return len(fx.graph_module._loader.eval_cache) + len(linecache.cache)


def modules() -> int:
    return sum(isinstance(o, nn.Module) for o in gc.get_objects())


def measure(model_name: str, call_name: str) -> dict[str, Any]:
    """In this process: the growth over all calls."""
    torch.set_num_threads(1)
    name, options = MODELS[model_name]
    model, x = timm.create_model(name, **options), torch.randn(2, 3, 32, 32)
    calls, call = CALLS[call_name]
    for _ in range(WARM_UP):
        call(model, x)
    gc.collect()
    before = sources(), modules()
    counts, residents = [], []
    for count in range(1, calls + 1):
        call(model, x)
        if count % EVERY == 0:
            gc.collect()
            counts.append(count)
            residents.append(resident_bytes())
    slope = statistics.linear_regression(counts, residents).slope
    return {
        "model": model_name,
        "call": call_name,
        "calls": calls,
        "kilobytes a call": round(slope / 1e3, 1),
        "sources a call": round((sources() - before[0]) / calls, 3),
        "modules a call": round((modules() - before[1]) / calls, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    measured = parser.parse_args().measure
    if measured:
        print(json.dumps(measure(*measured)))
        return
    rows = []
    for model in MODELS:
        for call in CALLS:
            command = [sys.executable, __file__, "--measure", model, call]
            rows.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
            print(rows[-1], flush=True)
    print(record.write("leaks", rows))


if __name__ == "__main__":
    main()
