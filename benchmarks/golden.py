"""Golden figures of a commit, to be set beside another's: bytes, peak, and the bits of one seeded training step.

    python benchmarks/golden.py [--models ...] [--recipes ...] [--compiled]      writes results/golden.json
    python benchmarks/golden.py --against results/golden.json --name golden-now  and tells what differs

Batch 2, one thread, weights and images from fixed seeds. Bits are those of eager steps on one kind of CPU; compiled steps are held
to their losses.
"""

import argparse
import gc
import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import record
import timm
import torch
import torch.nn.functional as F
from tabulate import tabulate
from truth import FOUR, FURTHER

import s2a_fx

RECIPES = ["full", "linear", "bias", "bias+checkpoint", "bias+lrp+lsb", "s2a-paper", "s2a", "s2a-max"]
COMPILED = ["vit_small_patch16_224", "convnext_tiny", "resnet50"], ["bias", "bias+checkpoint", "s2a"]
CLASSES = 100
PEAK_TOLERANCE = 0.005
LOSS_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Row:
    """One model under one recipe. Digests are of the bits; that of the gradients does not depend on names or order."""

    model: str
    recipe: str
    saved_bytes: int
    peak_bytes: int
    trained: int
    loss: str
    gradients: str
    gradient_norm: float
    evaluation: str


@dataclass(frozen=True)
class CompiledRow:
    """The losses of three compiled AdamW steps."""

    model: str
    recipe: str
    losses: list[float]


def build(name: str, recipe: str) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=CLASSES).train()
    x = torch.randn(2, *model.pretrained_cfg["input_size"])
    torch.manual_seed(1)
    return s2a_fx.transform(model, x, recipe), x, torch.tensor([3, 7])


def measure(name: str, recipe: str) -> Row:
    gm, x, labels = build(name, recipe)
    report = s2a_fx.analyze(gm, x)
    gm.eval()
    with torch.no_grad():
        evaluation = _digest(gm(x))
    gm.train()
    torch.manual_seed(2)
    loss = F.cross_entropy(gm(x), labels)
    loss.backward()
    gradients = [p.grad for p in gm.parameters() if p.grad is not None]
    return Row(
        model=name,
        recipe=recipe,
        saved_bytes=report.saved_bytes,
        peak_bytes=report.peak_bytes,
        trained=sum(p.numel() for p in gm.parameters() if p.requires_grad),
        loss=loss.item().hex(),
        gradients=hashlib.sha256("".join(sorted(map(_digest, gradients))).encode()).hexdigest(),
        gradient_norm=math.sqrt(sum(g.double().square().sum().item() for g in gradients)),
        evaluation=evaluation,
    )


def measure_compiled(name: str, recipe: str) -> CompiledRow:
    gm, x, labels = build(name, recipe)
    optimizer = torch.optim.AdamW([p for p in gm.parameters() if p.requires_grad], lr=1e-4)
    compiled = torch.compile(gm)
    losses = []
    for _ in range(3):
        loss = F.cross_entropy(compiled(x), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return CompiledRow(name, recipe, losses)


def _digest(tensor: torch.Tensor) -> str:
    described = f"{tuple(tensor.shape)} {tensor.dtype} ".encode()
    return hashlib.sha256(described + tensor.detach().contiguous().numpy().tobytes()).hexdigest()


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(model, recipe, what differs) for all rows that both have; a row that only `before` has is told, too."""
    found = []
    later = {(row["model"], row["recipe"]): row for row in now["eager"]}
    for old in before["eager"]:
        key = (old["model"], old["recipe"])
        found += [(*key, text) for text in (_changes(old, later[key]) if key in later else ["missing"])]
    compiled = {(row["model"], row["recipe"]): row["losses"] for row in now["compiled"]}
    for old in before["compiled"]:
        key = (old["model"], old["recipe"])
        if key not in compiled:
            found.append((*key, "compiled: missing"))
        elif (worst := max(abs(a - b) for a, b in zip(old["losses"], compiled[key], strict=True))) > LOSS_TOLERANCE:
            found.append((*key, f"compiled losses differ by {worst:.1e}"))
    return found


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    texts = []
    if old["saved_bytes"] != new["saved_bytes"]:
        texts.append(f"saved bytes {old['saved_bytes']:,} -> {new['saved_bytes']:,}")
    if abs(new["peak_bytes"] / old["peak_bytes"] - 1) > PEAK_TOLERANCE:
        texts.append(f"peak {old['peak_bytes']:,} -> {new['peak_bytes']:,}")
    texts += [f"{name} {old[name]} -> {new[name]}" for name in ("trained", "loss") if old[name] != new[name]]
    if old["gradients"] != new["gradients"]:
        texts.append(f"gradients' bits; norm {old['gradient_norm']:.9g} -> {new['gradient_norm']:.9g}")
    if old["evaluation"] != new["evaluation"]:
        texts.append("bits of the output in eval mode")
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=[*reversed(FURTHER), *reversed(FOUR)])
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--compiled", action="store_true", help="the compiled steps too")
    parser.add_argument("--against", type=Path, help="the JSON of another commit")
    parser.add_argument("--name", default="golden", help="of the JSON in benchmarks/results (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    before = json.loads(options.against.read_text()) if options.against else None
    if before is not None and before["device"] != record.cpu():
        parser.error(f"{options.against} was recorded on {before['device']}, and bits differ from one CPU to another; run it here")
    figures: dict[str, list[Any]] = {"eager": [], "compiled": []}
    for name in options.models:
        for recipe in options.recipes:
            figures["eager"].append(asdict(measure(name, recipe)))
            gc.collect()
            print(*list(figures["eager"][-1].values())[:6], flush=True)
        record.write(options.name, figures)  # after every model: a long run that is cut off has left what it knows
    for name, recipe in [(name, recipe) for name in COMPILED[0] for recipe in COMPILED[1]] if options.compiled else []:
        figures["compiled"].append(asdict(measure_compiled(name, recipe)))
        print(*figures["compiled"][-1].values(), flush=True)
        record.write(options.name, figures)
    if before is not None:
        found = differences(before["figures"], figures)
        print(tabulate(found, ("model", "recipe", "differs")) if found else "no difference")
        raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
