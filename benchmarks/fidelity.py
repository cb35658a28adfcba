"""How true the gradient stays: a recipe's gradient against the exact one of the very same trained parameters.

    python benchmarks/fidelity.py [RECIPE ...] [--images 64] [--batch-size 16]

Real weights and real images (see real_data.py), in train mode, every drop rate 0. The exact gradient comes from the same recipe
without its compressing passes: those after the last that changes what is trained. Both modules read the same storages. Every
trained parameter is nudged first, since some gradients are 0 at the start: a prompt's B waits for A, the side branch for the head's
columns.

Cosines are over all trained parameters joined into one vector; over those before the head, as the head's own gradient is exact in
every recipe and nine tenths of the whole; and over each parameter by itself, of which the worst is shown. There, parameters whose
exact gradient is shorter than 1e-4 of the whole are set aside and counted. `length` is the length of the recipe's gradient before
the head in parts of the exact one's.
"""

import argparse
from collections.abc import Iterable, Sequence
from statistics import mean
from typing import Any

import real_data
import record
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import fx, nn

import s2a_fx
from s2a_fx.graph.heads import head_paths
from s2a_fx.recipes import GraphPass

RECIPES = ["s2a-paper", "s2a", "s2a-max"]
SEED = 0
NUDGE = 0.02
NEGLIGIBLE = 1e-4

Gradient = dict[str, torch.Tensor]
Row = dict[str, Any]


def split(model: nn.Module, x: torch.Tensor, recipe: Sequence[GraphPass]) -> tuple[fx.GraphModule, tuple[GraphPass, ...]]:
    """`model` with the passes of `recipe` up to the last that changes what is trained, and the compressing passes after it."""
    torch.manual_seed(SEED)
    stages = [s2a_fx.transform(model, x, ())]
    for graph_pass in recipe:
        stages.append(s2a_fx.transform(stages[-1], x, (graph_pass,)))
    first = [_trained_sizes(gm) for gm in stages].index(_trained_sizes(stages[-1]))
    return stages[first], tuple(recipe[first:])


def _trained_sizes(gm: nn.Module) -> list[int]:
    return sorted(p.numel() for p in gm.parameters() if p.requires_grad)  # without names: a compressing pass may move a parameter


@torch.no_grad()
def nudge(gm: nn.Module) -> None:
    """Move each trained parameter by noise of .02 of its root mean square; entries that are 0 by .02 itself."""
    generator = torch.Generator().manual_seed(SEED)
    for parameter in gm.parameters():
        if parameter.requires_grad:
            deviation = torch.where(parameter == 0, NUDGE, NUDGE * parameter.square().mean().sqrt())
            parameter.add_(torch.randn(parameter.shape, generator=generator) * deviation)


def gradient(gm: nn.Module, x: torch.Tensor, labels: torch.Tensor, names: dict[int, str]) -> Gradient:
    """Of the cross-entropy, by the names in `names`, whose keys are the addresses of the parameters' storages."""
    trained = {names.get(p.data_ptr(), n): p for n, p in gm.named_parameters() if p.requires_grad}
    if trained.keys() != set(names.values()):
        raise SystemExit(f"not the same parameters are trained: {sorted(trained.keys() ^ set(names.values()))}")
    torch.manual_seed(SEED)
    gradients = torch.autograd.grad(F.cross_entropy(gm(x), labels), list(trained.values()))
    return dict(zip(trained, (g.double().flatten() for g in gradients), strict=True))


def compare(exact: Gradient, coded: Gradient, heads: tuple[str, ...]) -> Row:
    """The row of one batch."""
    negligible = NEGLIGIBLE * _joined(exact, exact).norm()
    body = [name for name in exact if not any(name.startswith(head + ".") for head in heads)]
    counted = [name for name, g in exact.items() if g.norm() >= negligible]
    layers = {name: _cosine(exact, coded, [name]) for name in counted}
    worst = min(layers, key=layers.__getitem__)
    return {
        "cosine": _cosine(exact, coded, exact),
        "before the head": _cosine(exact, coded, body),
        "length": (_joined(coded, body).norm() / _joined(exact, body).norm()).item(),
        "worst layer": layers[worst],
        "its name": worst,
        "set aside": len(exact) - len(counted),
    }


def _joined(gradient: Gradient, names: Iterable[str]) -> torch.Tensor:
    return torch.cat([gradient[name] for name in names])


def _cosine(exact: Gradient, coded: Gradient, names: Iterable[str]) -> float:
    names = list(names)
    return F.cosine_similarity(_joined(exact, names), _joined(coded, names), dim=0).item()


def check(recipe: str, batches: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[Row]:
    torch.manual_seed(SEED)
    model = real_data.vit_small().train()
    x = batches[0][0]
    exact, compressing = split(model, x, s2a_fx.RECIPES[recipe])
    nudge(exact)
    coded = s2a_fx.transform(exact, x, compressing)
    names = {p.data_ptr(): n for n, p in exact.named_parameters() if p.requires_grad}
    heads = tuple(head_paths(exact))
    rows = []
    for index, batch in enumerate(batches):
        figures = compare(gradient(exact, *batch, names), gradient(coded, *batch, names), heads)
        rows.append({"recipe": recipe, "batch": str(index), **figures})
        print(*rows[-1].values(), flush=True)
    means = {key: mean(row[key] for row in rows) for key in ("cosine", "before the head", "length", "worst layer")}
    lowest = min(rows, key=lambda row: row["worst layer"])
    most = max(row["set aside"] for row in rows)
    rows.append({"recipe": recipe, "batch": "mean", **means, "its name": lowest["its name"], "set aside": most})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    options = parser.parse_args()
    images, labels = real_data.solar_cells(options.images)
    batches = list(zip(images.split(options.batch_size), labels.split(options.batch_size), strict=True))
    rows = []
    for recipe in options.recipes or RECIPES:
        if recipe in s2a_fx.RECIPES:
            rows += check(recipe, batches)
        else:
            print(f"{recipe}: skipped, there is no recipe of this name")
    print(tabulate(rows, headers="keys", floatfmt=".5f"))
    print(record.write("fidelity", rows))


if __name__ == "__main__":
    main()
