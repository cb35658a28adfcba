"""What accuracy each method keeps: real weights, photographs of solar cells, and the pieces that `s2a-fx finetune` is made of.

    python benchmarks/accuracy.py --runs FILE [--shard 0/2]    train what FILE lacks; a run is a line, appended when it is over
    python benchmarks/accuracy.py --runs FILE --summary        measure memory, write results/accuracy.json, print the tables

1. Task: is a cell defective (probability .5 or more) or not. As many of one as of the other in every part of the data, so that
   balanced accuracy is the share of images that are right. The validation images are the same in all runs and in no other part;
   training and test images are drawn anew by each seed, the same for every method.
2. Every method gets the same images, epochs, flips and schedule (AdamW, warm-up and cosine, label smoothing, a head that begins at
   zero), and its own learning rate, found in runs of their own on the first `--search-train` of a seed's training images: each rate
   with the first seed, the two best with all seeds; that of the highest mean on the validation images is taken, the smaller of
   equals. These runs see no test image.
3. Time is that of the CPU in training steps, not of the clock: other work on the machine changes it less.

Batch norms keep their statistics in all methods, as `s2a-fx finetune --freeze-batch-norm` has it.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean, median, stdev
from time import process_time
from typing import Any

import real_data
import record
import torch
from tabulate import tabulate
from torch import nn

import s2a_fx
from s2a_fx.analysis.measure import measure_peak_bytes, measure_saved_bytes
from s2a_fx.finetune import FinetuneOptions, evaluate, training_steps
from s2a_fx.finetune.model import batch_norms
from s2a_fx.finetune.objective import make_loss, make_optimizer, make_scheduler, no_decay
from s2a_fx.passes import AttachSideBranch, InsertLowRankPrompt
from s2a_fx.recipes import GraphPass, resolve

SEEDS = (0, 1, 2)
FINALISTS = 2  # learning rates that are tried with every seed
ALL_IMAGES = 2624
COMPARED = ("full", "bias+lrp+lsb")
TUNED, ADDED, HEAD = (1e-3, 3e-3, 1e-2), (3e-4, 1e-3, 3e-3), (3e-3, 1e-2, 3e-2)
UNDER_ONE_PERCENT = "s2a, < 1 %"
"""`s2a` with smaller prompts and side branch, the one method that no recipe is named after: the models are narrow, and `s2a` itself
trains more of them."""


def smaller(rank: int, skip: int = 0, reduction: int = 8) -> tuple[GraphPass, ...]:
    """`s2a` with prompts of another rank, and prompts and side branch in the stages after the first `skip` alone."""
    changed = {
        InsertLowRankPrompt: InsertLowRankPrompt(rank=rank, skip=skip),
        AttachSideBranch: AttachSideBranch(reduction=reduction, skip=skip),
    }
    return tuple(changed.get(type(p), p) for p in resolve("s2a"))  # type: ignore[call-overload]


@dataclass(frozen=True)
class Pairing:
    """A model, the passes of `UNDER_ONE_PERCENT` on it, and for each method in the order of the runs the learning rates tried."""

    build: Callable[[], nn.Module]
    under_one_percent: tuple[GraphPass, ...]
    rates: dict[str, tuple[float, ...]]

    def recipe(self, method: str) -> str | tuple[GraphPass, ...]:
        return self.under_one_percent if method == UNDER_ONE_PERCENT else method


PAIRINGS = {
    "vit_small_patch14_dinov2": Pairing(
        real_data.vit_small,
        smaller(rank=18),
        {
            "full": (3e-6, 1e-5, 3e-5, 1e-4),
            "bias+lrp+lsb": TUNED,
            "s2a": TUNED,
            UNDER_ONE_PERCENT: TUNED,
            "linear": HEAD,
            "s2a-paper": TUNED,
            "s2a-max": TUNED,
            "bias": TUNED,
            "lora": ADDED,
            "bias+lrp": TUNED,
            "adapter": ADDED,
            "vpt": TUNED,
        },
    ),
    "tf_efficientnet_lite0": Pairing(
        real_data.efficientnet_lite0,
        smaller(rank=4, skip=3, reduction=16),
        {
            "full": (1e-4, 3e-4, 1e-3),
            "bias+lrp+lsb": TUNED,
            "s2a": TUNED,
            UNDER_ONE_PERCENT: TUNED,
            "linear": HEAD,
            "bias": TUNED,
        },
    ),
}


@dataclass(frozen=True)
class Setting:
    """Images in each part of the data, passes over the training images, of which `warmup` with a rising rate, images in a step.

    Runs that search for a learning rate have no test images.
    """

    train: int
    validation: int
    test: int
    epochs: int
    warmup: int
    batch_size: int


@dataclass(frozen=True)
class Run:
    """A finished run: mean loss of the last epoch, balanced accuracies (0 to 1), CPU seconds in training steps, torch's version."""

    model: str
    method: str
    lr: float
    seed: int
    setting: Setting
    loss: float
    validation: float
    test: float | None
    seconds: float
    torch: str = torch.__version__


@dataclass(frozen=True)
class Row:
    """A method: its learning rate, test accuracies by `seeds`, cost; or why it refuses the model. Bytes are of one step."""

    model: str
    method: str
    refused: str | None = None
    lr: float | None = None
    test: tuple[float, ...] = ()
    seeds: tuple[int, ...] = ()
    trained_percent: float | None = None
    trained_percent_without_head: float | None = None
    kept_bytes: int | None = None
    peak_bytes: int | None = None
    time_over_full: float | None = None


@dataclass(frozen=True)
class Data:
    """All images, (N, 3, 98, 98), and their labels."""

    images: torch.Tensor
    labels: torch.Tensor

    def batches(self, indices: torch.Tensor, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for chosen in indices.split(size):
            yield self.images[chosen], self.labels[chosen]


def split(labels: torch.Tensor, setting: Setting, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Indices of training, validation and test images; as many of each class, the validation images the same for every seed."""
    always, drawn = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    classes = labels.unique()
    sizes = [size // len(classes) for size in (setting.validation, setting.train, setting.test)]
    parts = []
    for label in classes:
        images = (labels == label).nonzero().flatten()
        if len(images) < sum(sizes):
            raise SystemExit(f"class {int(label)} has {len(images)} images, asked for {sum(sizes)}: take smaller parts")
        images = images[torch.randperm(len(images), generator=always)]
        others = images[sizes[0] :]
        others = others[torch.randperm(len(others), generator=drawn)]
        parts.append((*others[: sum(sizes[1:])].split(sizes[1:]), images[: sizes[0]]))
    train, test, validation = (torch.cat(part) for part in zip(*parts, strict=True))
    return train, validation, test


def flipped(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each image mirrored, turned upside down, both or neither."""
    for side in (2, 3):
        chosen = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
        images = torch.where(chosen, images.flip(side), images)
    return images


def start(model: str) -> nn.Module:
    """timm's model with its real weights and a head of zeros."""
    original = PAIRINGS[model].build()
    for parameter in original.get_classifier().parameters():
        nn.init.zeros_(parameter)
    return original


def build(original: nn.Module, recipe: str | tuple[GraphPass, ...], example: torch.Tensor) -> nn.Module:
    """The module to train, its batch norms at rest."""
    gm = s2a_fx.transform(original, example, recipe).train()
    for path in batch_norms(original):
        gm.get_submodule(path).eval()
    return gm


def train(method: "Method", lr: float, seed: int, setting: Setting, data: Data) -> Run:
    options = FinetuneOptions(
        model=method.model,
        data=Path("elpv-dataset"),
        recipe=method.recipe,
        epochs=setting.epochs,
        warmup_epochs=setting.warmup,
        batch_size=setting.batch_size,
        lr=lr,
        seed=seed,
        from_scratch=True,  # the weights are loaded by `start`
    )
    torch.manual_seed(seed)
    training, validation, test = split(data.labels, setting, seed)
    original = start(method.model)
    gm = build(original, method.recipe, data.images[: setting.batch_size])
    optimizer, loss = make_optimizer(gm, options, no_decay(original)), make_loss(options)
    updates = len(training) // setting.batch_size
    scheduler = make_scheduler(optimizer, options, updates)
    generator = torch.Generator().manual_seed(seed)
    done, losses, seconds = 0, torch.zeros(updates), 0.0

    def next_rate() -> None:
        scheduler.step_update(done + 1)

    for _ in range(setting.epochs):
        order = training[torch.randperm(len(training), generator=generator)][: updates * setting.batch_size]
        batches = [(flipped(x, generator), y) for x, y in data.batches(order, setting.batch_size)]
        started = process_time()
        for value in training_steps(gm, batches, optimizer, loss, after_update=next_rate):
            losses[done % updates] = value
            done += 1
        seconds += process_time() - started
    found = [evaluate(gm, data.batches(part, 50), 2).balanced if len(part) else None for part in (validation, test)]
    assert found[0] is not None
    return Run(method.model, method.name, lr, seed, setting, losses.mean().item(), found[0], found[1], seconds)


@dataclass(frozen=True)
class Method:
    """A method on a model: its runs in a file, one a line, and those to come."""

    model: str
    name: str
    file: Path

    @property
    def recipe(self) -> str | tuple[GraphPass, ...]:
        return PAIRINGS[self.model].recipe(self.name)

    def runs(self, setting: Setting) -> list[Run]:
        """What was run with this setting."""
        return [r for r in read(self.file, setting) if (r.model, r.method) == (self.model, self.name)]

    def told(self, search: Setting, final: Setting) -> list[Run]:
        """The final runs with the learning rate that the search found, by seed; none before it has."""
        best = best_rates(self.runs(search), len(SEEDS))[:1]
        return sorted((r for r in self.runs(final) if r.lr in best), key=lambda r: r.seed)

    def run(self, setting: Setting, lr: float, seed: int, data: Data) -> None:
        """Train and append to the file, if it is not there."""
        if any((r.lr, r.seed) == (lr, seed) for r in self.runs(setting)):
            return
        finished = train(self, lr, seed, setting, data)
        with self.file.open("a") as stream:
            stream.write(json.dumps(asdict(finished)) + "\n")
        print(", ".join(f"{name} {value}" for name, value in asdict(finished).items() if name != "setting"), flush=True)

    def run_all(self, search: Setting, final: Setting, data: Data) -> None:
        """The runs that search for the learning rate, then those with the one found."""
        for lr in PAIRINGS[self.model].rates[self.name]:
            self.run(search, lr, SEEDS[0], data)
        for lr, seed in product(best_rates(self.runs(search), 1)[:FINALISTS], SEEDS[1:]):
            self.run(search, lr, seed, data)
        best, *_ = best_rates(self.runs(search), len(SEEDS))
        for seed in SEEDS:
            self.run(final, best, seed, data)


def read(file: Path, setting: Setting) -> list[Run]:
    """The runs in `file` that had this setting."""
    lines = file.read_text().splitlines() if file.exists() else []
    runs = [json.loads(line) for line in lines]
    return [Run(**{**run, "setting": setting}) for run in runs if run["setting"] == asdict(setting)]


def best_rates(runs: list[Run], seeds: int) -> list[float]:
    """The learning rates of so many seeds, that of the highest mean validation accuracy first, the smaller of equals."""
    found: dict[float, list[float]] = {}
    for run in runs:
        if run.seed < seeds:
            found.setdefault(run.lr, []).append(run.validation)
    means = {lr: round(mean(values), 6) for lr, values in found.items() if len(values) == seeds}  # last digits break no tie
    return sorted(means, key=lambda lr: (-means[lr], lr))


def methods(file: Path, models: list[str]) -> list[Method]:
    return [Method(model, name, file) for model in models for name in PAIRINGS[model].rates]


def work(file: Path, search: Setting, final: Setting, models: list[str], shard: tuple[int, int]) -> None:
    """Train what is not in `file` yet."""
    data = Data(*real_data.solar_cells(ALL_IMAGES))
    for method in methods(file, models)[shard[0] :: shard[1]]:
        try:
            method.run_all(search, final, data)
        except s2a_fx.S2AError as refusal:
            print(f"{method.model}, {method.name}: {refusal}", flush=True)


def row(method: Method, search: Setting, final: Setting) -> Row | None:
    """The row of a method, None if not all of its runs are there; its memory is measured here."""
    x = torch.randn(final.batch_size, 3, real_data.SIDE, real_data.SIDE)
    original = start(method.model)
    size, head = (sum(p.numel() for p in m.parameters()) for m in (original, original.get_classifier()))
    try:
        gm = build(original, method.recipe, x)
    except s2a_fx.S2AError as refusal:
        return Row(method.model, method.name, refused=str(refusal))
    found, full = method.told(search, final), replace(method, name="full").told(search, final)
    if len(found) != len(SEEDS) or not full:
        return None
    trained = sum(p.numel() for p in gm.parameters() if p.requires_grad)
    kept = measure_saved_bytes(gm, (x,))
    optimizer = torch.optim.AdamW([p for p in gm.parameters() if p.requires_grad])
    return Row(
        model=method.model,
        method=method.name,
        lr=found[0].lr,
        test=tuple(r.test for r in found if r.test is not None),
        seeds=tuple(r.seed for r in found),
        trained_percent=100 * trained / size,
        trained_percent_without_head=100 * (trained - head) / (size - head),
        kept_bytes=kept,
        peak_bytes=measure_peak_bytes(gm, (x,), optimizer),
        time_over_full=median(r.seconds for r in found) / median(r.seconds for r in full),
    )


def table(rows: list[Row]) -> str:
    """The methods on one model; under `- NAME` the difference, in points, to the accuracy of NAME with the same seed."""
    of = {r.method: dict(zip(r.seeds, r.test, strict=True)) for r in rows if not r.refused}
    return tabulate([_line(r, of) for r in rows], headers="keys", tablefmt="github", disable_numparse=True)


def _line(r: Row, of: dict[str, dict[int, float]]) -> dict[str, Any]:
    if r.refused:
        return {"method": r.method, "balanced accuracy %": f"refused: {r.refused}"}
    assert r.kept_bytes is not None and r.peak_bytes is not None
    return {
        "method": r.method,
        "balanced accuracy %": _points(r.test),
        **({"of full %": f"{100 * mean(r.test) / mean(of['full'].values()):.1f}"} if "full" in of else {}),
        **{f"- {name}": _points(_differences(of[r.method], of[name])) for name in COMPARED if name in of},
        "seeds": len(r.test),
        "lr": f"{r.lr:g}",
        "trained %": f"{r.trained_percent:.2f}",
        "without head %": f"{r.trained_percent_without_head:.2f}",
        "kept MB": f"{r.kept_bytes / 1e6:.1f}",
        "peak MB": f"{r.peak_bytes / 1e6:.1f}",
        "time / full": f"{r.time_over_full:.2f}",
    }


def _differences(ours: dict[int, float], theirs: dict[int, float]) -> list[float]:
    """Ours less theirs, for each seed that both have."""
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def _points(shares: Sequence[float]) -> str:
    """Mean and deviation, in points of a hundred; nothing of none."""
    if not shares:
        return ""
    return f"{100 * mean(shares):.2f} ± {100 * stdev(shares):.2f}" if len(shares) > 1 else f"{100 * shares[0]:.2f}"


def summarize(file: Path, search: Setting, final: Setting, models: list[str]) -> None:
    rows: list[Row] = []
    for model in models:
        found = {method.name: row(method, search, final) for method in methods(file, [model])}
        for name in (n for n, r in found.items() if r is None):
            print(f"{model}, {name}: skipped, {file} has not all of its runs, or nothing of full")
        own = [r for r in found.values() if r is not None]
        if any(not r.refused for r in own):
            print(f"\n{model}\n\n{table(own)}\n")
            rows += own
    figures = {
        "search": asdict(search),
        "final": asdict(final),
        "rows": [asdict(r) for r in rows],
        "runs": [asdict(r) for setting in (search, final) for r in read(file, setting)],
    }
    print(record.write("accuracy", figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, metavar="FILE")
    parser.add_argument("--summary", action="store_true")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="train every N-th method from the I-th")
    parser.add_argument("--models", nargs="+", default=list(PAIRINGS), choices=PAIRINGS)
    parser.add_argument("--train", type=int, default=640)
    parser.add_argument("--search-train", type=int, default=320)
    parser.add_argument("--validation", type=int, default=200)
    parser.add_argument("--test", type=int, default=800)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=16)
    options = parser.parse_args()
    final = Setting(options.train, options.validation, options.test, options.epochs, options.warmup, options.batch_size)
    search = replace(final, train=options.search_train, test=0)
    if options.summary:
        summarize(options.runs, search, final, options.models)
    else:
        shard, shards = (int(part) for part in options.shard.split("/"))
        if not 0 <= shard < shards:
            raise SystemExit(f"--shard: got {options.shard}, wanted I/N with I from 0 to N - 1")
        work(options.runs, search, final, options.models, (shard, shards))


if __name__ == "__main__":
    main()
