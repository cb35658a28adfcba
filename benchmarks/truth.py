"""Predicted against measured: saved bytes and peak of real training steps on the CPU.

    python benchmarks/truth.py [--batch-size 2] [--models ...]

Saved bytes are counted by saved-tensor hooks, the peak from the allocator's own events (torch.profiler), both on real tensors in
train mode, the peak in the second of two AdamW steps.
"""

import argparse
import gc

import record
import timm
import torch
from tabulate import tabulate

import s2a_fx
from s2a_fx.analysis.measure import measure_peak_bytes, measure_saved_bytes

FOUR = ["vit_base_patch16_224", "swin_base_patch4_window7_224", "convnext_base", "resnet50"]
FURTHER = ["efficientnet_b0", "beit_base_patch16_224", "pvt_v2_b0", "poolformer_s12", "xcit_nano_12_p8_224", "convnextv2_atto"]
FURTHER += ["maxvit_tiny_tf_224", "davit_tiny", "regnety_002", "deit_tiny_distilled_patch16_224"]
RECIPES = ["full", "linear", "bias", "s2a-paper", "s2a", "s2a-max"]


def check(name: str, recipe: str, batch_size: int) -> dict[str, object]:
    torch.manual_seed(0)
    model = timm.create_model(name).train()
    x = torch.randn(batch_size, *model.pretrained_cfg["input_size"])
    gm = s2a_fx.transform(model, x, recipe)
    report = s2a_fx.analyze(gm, x)
    saved = measure_saved_bytes(gm, (x,))
    optimizer = torch.optim.AdamW([p for p in gm.parameters() if p.requires_grad])
    peak = measure_peak_bytes(gm, (x,), optimizer)
    return {
        "model": name,
        "recipe": recipe,
        "batch_size": batch_size,
        "saved_predicted": report.saved_bytes,
        "saved_measured": saved,
        "peak_predicted": report.peak_bytes,
        "peak_measured": peak,
        "peak_ratio": round(report.peak_bytes / peak, 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--models", nargs="+", default=FOUR + FURTHER)
    options = parser.parse_args()
    rows = []
    for name in options.models:
        for recipe in RECIPES:
            rows.append(check(name, recipe, options.batch_size))
            gc.collect()
            print(*rows[-1].values(), flush=True)
        path = record.write("truth", rows)  # after every model: a long run that is cut off has left what it knows
    print(tabulate(rows, headers="keys"))
    print(path)


if __name__ == "__main__":
    main()
