"""Compiled steps side by side: as they are, under the compiler's own memory budget, and coded.

    python benchmarks/compiled.py [MODEL] [--batch-size N] [--rounds N]

All rows train the same weights, those of `bias+lrp+lsb`. Kept bytes are the storages that the compiled forward hands to the
backward, weights and copies of weights left out, measured; times are of forward and backward, the methods in turn; the cosine is of
all gradients against the eager ones of `bias+lrp+lsb`.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import record
import timm
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import nn
from torch._functorch import config as aot_config

import s2a_fx
from s2a_fx.inductor import CodingPartitioner

Compile = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class Row:
    """One method: what its compiled step keeps (bytes), what was predicted, and step times (seconds) by round."""

    method: str
    kept_bytes: int
    predicted_bytes: int | None
    gradient_cosine: float
    seconds: tuple[float, ...]
    over_first: float


@dataclass(frozen=True)
class Method:
    """A recipe, how it is compiled, and under which budget of activation memory."""

    recipe: str
    compile: Compile
    budget: float = 1.0
    predicted: bool = True


def _plain(model: nn.Module) -> nn.Module:
    return torch.compile(model, fullgraph=True)


METHODS = {
    "compiled": Method("bias+lrp+lsb", _plain),
    "compiled, budget .5": Method("bias+lrp+lsb", _plain, 0.5),
    "compiled, budget 0": Method("bias+lrp+lsb", _plain, 0.0),
    "compiled s2a": Method("s2a", _plain),
    'backend "s2a"': Method("bias+lrp+lsb", lambda m: torch.compile(m, backend="s2a", fullgraph=True), predicted=False),
    "CodingPartitioner(8)": Method(
        "bias+lrp+lsb",
        lambda m: torch.compile(m, fullgraph=True, options={"custom_partitioner_fn": CodingPartitioner(8)}),
        predicted=False,
    ),
}


def transformed(model: nn.Module, x: torch.Tensor, recipe: str) -> nn.Module:
    """The model under a recipe, new parameters drawn alike."""
    torch.manual_seed(1)
    return s2a_fx.transform(model, x, recipe)


def gradients(module: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """All gradients of one step, joined."""
    module.zero_grad()
    F.cross_entropy(module(x), labels).backward()
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def kept_bytes(module: nn.Module, x: torch.Tensor) -> int:
    """What the compiled forward hands to the backward, each storage once; weights, and copies of them, left out."""
    weights = list(module.parameters()) + list(module.buffers())
    own = {t.untyped_storage().data_ptr() for t in weights}
    by_shape: dict[torch.Size, list[torch.Tensor]] = {}
    for weight in weights:
        by_shape.setdefault(weight.shape, []).append(weight)
    storages = {}
    for tensor in module(x).grad_fn.saved_tensors:
        if tensor is None or tensor.untyped_storage().data_ptr() in own:
            continue
        if not any(torch.equal(tensor, weight) for weight in by_shape.get(tensor.shape, [])):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="vit_base_patch16_224")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = timm.create_model(options.model, num_classes=100).train()
    x = torch.randn(options.batch_size, *model.default_cfg["input_size"])
    labels = torch.arange(options.batch_size) % 100
    exact = gradients(transformed(model, x, "bias+lrp+lsb"), x, labels)

    modules, kept, predicted, cosines = {}, {}, {}, {}
    for name, method in METHODS.items():
        gm = transformed(model, x, method.recipe)
        with aot_config.patch(activation_memory_budget=method.budget):
            predicted[name] = s2a_fx.analyze(gm, x, mode="compile").saved_bytes if method.predicted else None
            modules[name] = method.compile(gm)
            cosines[name] = F.cosine_similarity(gradients(modules[name], x, labels), exact, 0).item()
        kept[name] = kept_bytes(modules[name], x)
        print(f"{name}: {kept[name]:,} bytes kept, {predicted[name]} predicted, cosine {cosines[name]:.5f}", flush=True)

    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    for turn in range(options.rounds):
        for name, module in list(modules.items())[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            gradients(module, x, labels)
            seconds[name].append(time.perf_counter() - start)
    first = next(iter(METHODS))
    ratios = {n: statistics.median(t / r for t, r in zip(seconds[n], seconds[first], strict=True)) for n in METHODS}
    rows = [Row(n, kept[n], predicted[n], cosines[n], tuple(seconds[n]), ratios[n]) for n in METHODS]
    lines = [(r.method, f"{r.kept_bytes / 1e6:,.1f}", f"{r.gradient_cosine:.4f}", f"{r.over_first:.2f}") for r in rows]
    print(tabulate(lines, ("method", "kept MB", "cosine", "time / compiled"), disable_numparse=True))
    figures = {"model": options.model, "batch_size": options.batch_size, "rows": [asdict(row) for row in rows]}
    print(record.write(f"compiled_{options.model}", figures))


if __name__ == "__main__":
    main()
