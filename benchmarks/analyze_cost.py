"""What `analyze` costs against another checkout of the project: ratios of process CPU time, rounds of both side by side.

git worktree add ../before COMMIT
python benchmarks/analyze_cost.py --before ../before [--rounds 15]
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path

import record

MODELS = ["vit_base_patch16_224", "swin_base_patch4_window7_224", "convnext_base"]
ONE_ROUND = """
import gc, sys, time
import s2a_fx
from s2a_fx.zoo import timm_model

model, inputs = timm_model(sys.argv[1])
s2a_fx.analyze(model, inputs)
gc.collect()
start = time.process_time()
s2a_fx.analyze(model, inputs)
print(time.process_time() - start)
"""


def seconds(checkout: Path, model: str) -> float:
    """CPU time of the second `analyze` of a process, garbage of the first collected before."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    command = [sys.executable, "-c", ONE_ROUND, model]
    return float(subprocess.run(command, env=environment, cwd=checkout, check=True, capture_output=True, text=True).stdout)


def median_interval(ratios: list[float]) -> list[float]:
    """The 95 % interval of the median, by resampling."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return [round(medians[50], 3), round(medians[-51], 3)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="the other checkout")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--models", nargs="+", default=MODELS)
    options = parser.parse_args()
    before, now = options.before.resolve(), Path(__file__).resolve().parents[1]
    rows = []
    for model in options.models:
        ratios = [seconds(now, model) / seconds(before, model) for _ in range(options.rounds)]
        rows.append({"model": model, "ratio": round(statistics.median(ratios), 3), "interval": median_interval(ratios)})
        print(rows[-1], flush=True)
    print(record.write("analyze_cost", {"rounds": options.rounds, "models": rows}))


if __name__ == "__main__":
    main()
