"""What a report costs: wall time and resident memory of the whole command, and the time of one process against two.

python benchmarks/report_cost.py [--runs 3]
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time

import record

MODELS = ["vit_base_patch16_224", "swin_base_patch4_window7_224", "convnext_base", "resnet50", "vit_giant_patch14_224"]
ONE_PROCESS = "import sys; from s2a_fx.cli import main; sys.exit(main(sys.argv[1:]))"


def run(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    runs = parser.parse_args().runs
    rows = []
    for model in MODELS:
        arguments = ["report", model, "--against", "full", "--batch-size", "32"]
        shared = [run(["s2a-fx", *arguments]) for _ in range(runs)]
        alone = [run([sys.executable, "-c", ONE_PROCESS, *arguments]) for _ in range(runs)]
        rows.append(
            {
                "model": model,
                "seconds": round(statistics.median(shared), 2),
                "ratio_to_one_process": round(statistics.median(shared) / statistics.median(alone), 3),
                "resident_mb_so_far": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6),
            }
        )
        print(rows[-1], flush=True)
    print(record.write("report_cost", rows))


if __name__ == "__main__":
    main()
