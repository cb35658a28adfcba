"""Which method fits my card? Kept bytes, peaks and the largest batch of every recipe, predicted for a CUDA device.

    python benchmarks/which_method.py [--models ...] [--dtypes float32 bfloat16] [--cards 8 16 24]

Nothing runs but simulations. A peak is the largest of several lines in the batch size: simulated at a few sizes, it lies below the
chords between them, from which the largest batch for a card is read.
Writes which_method.json and docs/which-method-fits-my-card.md.
"""

import argparse
import itertools
from pathlib import Path

import record
from tabulate import tabulate

import s2a_fx
from s2a_fx.analysis.device import CUDA
from s2a_fx.analysis.peak import peak, timeline
from s2a_fx.analysis.simulation import simulate
from s2a_fx.fork_map import fork_map
from s2a_fx.zoo import timm_model

MODELS = ["vit_base_patch16_224", "swin_base_patch4_window7_224", "convnext_base"]
METHODS = ["full", "full+checkpoint", "linear", "bias", "bias+checkpoint", "lora", "lora+compress", "adapter", "adapter+compress"]
METHODS += ["vpt", "vpt+compress", "unipt", "lst", "bias+lrp+lsb", "s2a-paper", "s2a", "s2a-max"]
BATCH = 32
SIZES = (2, 8, BATCH, 128, 512, 2048, 8192)
PAGE = Path(__file__).parent.parent / "docs" / "which-method-fits-my-card.md"


def figures(case: tuple[str, str, str], cards: list[int]) -> dict[str, object]:
    name, dtype, method = case
    model, example = timm_model(name, num_classes=100, batch_size=BATCH, dtype=dtype)
    gm = s2a_fx.transform(model, example, method)
    report = s2a_fx.analyze(gm, example, device="cuda")
    peaks = {size: peak(timeline(gm, simulate(gm, device=CUDA, batch_size=size))).bytes for size in SIZES}
    return {
        "model": name,
        "dtype": dtype,
        "method": method,
        "trained_percent": round(report.trainable_percent, 2),
        "saved_bytes": report.saved_bytes,
        "kept_bytes": report.kept_bytes,
        "peak_bytes": report.peak_bytes,
        "largest_batch": {card: largest_batch(peaks, card * 10**9) for card in cards},
    }


def largest_batch(peaks: dict[int, int], budget: int) -> int:
    """The largest batch whose peak, read off the chords between those simulated, fits the budget; 0 if none does."""
    for low, high in itertools.pairwise(peaks):
        if peaks[low] <= budget < peaks[high]:
            return low + int((budget - peaks[low]) * (high - low) / (peaks[high] - peaks[low]))
    return 0 if budget < peaks[SIZES[0]] else SIZES[-1]


def page(rows: list[dict[str, object]], cards: list[int], command: str) -> str:
    parts = [
        "# Which method fits my card?",
        f"""
What a training step keeps and peaks at, for images of 224 x 224 pixels, 100 classes and AdamW, predicted for a CUDA device by
`{command}`. *kept*: weights and all that autograd keeps at batch {BATCH}; *peak*: everything that stands at the
worst moment of the step. The last columns say how many images go into a step on a card of so many GB (10^9 bytes) with nothing
else on it: leave room for CUDA's own context and the allocator's fragmentation. What a method costs in accuracy is told in
[what accuracy is kept](what-accuracy-is-kept.md).

`+compress` keeps what autograd keeps in a few bits, `+checkpoint` puts `torch.utils.checkpoint` around every residual block; both
go with any method: `s2a_fx.transform(model, (x,), "lora+compress")`.

| if | take |
|---|---|
| all weights must train, and memory is short | `full+checkpoint` |
| few parameters may train, and memory is short | `s2a-max`; then `s2a` in float32, `bias+checkpoint` in 16 bits |
| it must be LoRA, adapters or prompts | the same with `+compress` |
| only a new head is wanted | `linear` |
""",
    ]
    for name, dtype in itertools.product(dict.fromkeys(r["model"] for r in rows), dict.fromkeys(r["dtype"] for r in rows)):
        lines = [
            (f"`{r['method']}`", f"{r['trained_percent']:.2f}", _mb(r["kept_bytes"]), _mb(r["peak_bytes"]), *_batches(r))
            for r in rows
            if (r["model"], r["dtype"]) == (name, dtype)
        ]
        headers = ("recipe", "trained %", "kept MB", "peak MB", *(f"images in {card} GB" for card in cards))
        align = ("left", *["right"] * (len(headers) - 1))
        parts.append(f"## {name}, {dtype}\n\n" + tabulate(lines, headers, tablefmt="github", disable_numparse=True, colalign=align))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _mb(size: object) -> str:
    return f"{size / 1e6:,.0f}"  # type: ignore[operator]


def _batches(row: dict[str, object]) -> list[str]:
    return [f"{count:,}" for count in row["largest_batch"].values()]  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--cards", nargs="+", type=int, default=[8, 16, 24])
    options = parser.parse_args()
    cases = list(itertools.product(options.models, options.dtypes, METHODS))
    rows = fork_map(lambda case: figures(case, options.cards), cases, 2)
    print(record.write("which_method", rows))
    PAGE.write_text(page(rows, options.cards, "python benchmarks/which_method.py"))
    print(PAGE)


if __name__ == "__main__":
    main()
