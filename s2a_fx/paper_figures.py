"""What the S2A paper's tables say, as it prints them, and the settings that its columns come from.

Table 1 compares methods, Table 2 quantized S2A with unquantized, Table 3 LRP with VPT, Table 4 S2A's parts; Figure 5 scales LRP
and LSB. All are at 224 x 224 px, batch 32, float32 and 100 classes. The paper gives one text for all backbones, but its figures
come out of a rule for each (`Setting`), found by recomputing them.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from s2a_fx.passes import (
    AttachSideBranch,
    AttachUniPT,
    InsertAdapter,
    InsertLowRankPrompt,
    InsertVisualPrompt,
    QuantizeNonParametric,
)
from s2a_fx.recipes import ADAPTER, BIAS, BIAS_LRP, BIAS_LRP_LSB, FULL, LINEAR, LORA, S2A_PAPER, VPT, GraphPass

BATCH_SIZE, CLASSES = 32, 100

BACKBONES = {"vit_base_patch16_224": "ViT-B/16", "swin_base_patch4_window7_224": "Swin-B", "convnext_base": "ConvNeXt-B"}
"""timm's name -> the paper's."""

PERCENT, MEGABYTES, MILLIONS = "parameters %", "memory MB", "parameters M"
ACCURACIES = ("VTAB-1k Natural", "VTAB-1k Specialized", "VTAB-1k Structured", "FGVC")

CountedParameters = Callable[[fx.GraphModule], int]


def all_but_side_norms(gm: fx.GraphModule) -> int:
    """All trained parameters, the side branch's normalization left out: the paper ignores it, eq. (6)."""
    return sum(p.numel() for name, p in gm.named_parameters() if p.requires_grad and not _normalizes_side_branch(name))


def all_but_biases(gm: fx.GraphModule) -> int:
    """Those, and no bias but the head's."""
    heads = ("head.fc.bias", "head.bias")
    named = [(name, p) for name, p in gm.named_parameters() if p.requires_grad and not _normalizes_side_branch(name)]
    return sum(p.numel() for name, p in named if not name.endswith("bias") or name in heads)


def all_but_biases_and_joined_columns(gm: fx.GraphModule) -> int:
    """Those, and of the head the columns for the backbone's features alone."""
    head = gm.get_parameter("head.fc.weight")
    side = max(p.shape[0] for name, p in gm.named_parameters() if name.endswith("block.project.weight"))
    return all_but_biases(gm) - head.shape[0] * side


def _normalizes_side_branch(name: str) -> bool:
    return name.startswith("side_branch.") and ".norm" in name


@dataclass(frozen=True)
class Setting:
    """How a row of the paper's comes about: the passes, and which of the trained parameters it counts."""

    recipe: tuple[GraphPass, ...]
    counts: CountedParameters = all_but_side_norms


_SWIN_PROMPTED = (*BIAS, InsertLowRankPrompt(skip=1))
_SWIN_S2A = (*_SWIN_PROMPTED, AttachSideBranch(skip=1))
_CONVNEXT_PROMPTED = (*BIAS, InsertLowRankPrompt(cells=7))
_CONVNEXT_S2A = (*_CONVNEXT_PROMPTED, AttachSideBranch(every=3))
_QUANTIZED = QuantizeNonParametric(bits=4)

SETTINGS: dict[str, dict[str, Setting]] = {
    "ViT-B/16": {
        "Full": Setting(FULL),
        "Linear": Setting(LINEAR),
        "LoRA": Setting(LORA),
        "Adapter": Setting(ADAPTER),
        "VPT": Setting(VPT),
        "UniPT": Setting((*LINEAR, AttachUniPT(reduction=4))),
        "LRP": Setting((*LINEAR, InsertLowRankPrompt())),
        "Bias": Setting(BIAS),
        "Bias+LRP": Setting(BIAS_LRP),
        "Bias+LRP+LSB": Setting(BIAS_LRP_LSB),
        "S2A": Setting(S2A_PAPER),
    },
    "Swin-B": {
        "Full": Setting(FULL),
        "Linear": Setting(LINEAR),
        "Adapter": Setting((*LINEAR, InsertAdapter(last=True))),
        "VPT": Setting((*LINEAR, InsertVisualPrompt(skip=1))),
        "UniPT": Setting((*LINEAR, AttachUniPT(reduction=16))),
        "LRP": Setting((*LINEAR, InsertLowRankPrompt(skip=1))),
        "Bias": Setting(BIAS),
        "Bias+LRP": Setting(_SWIN_PROMPTED),
        "Bias+LRP+LSB": Setting(_SWIN_S2A, all_but_biases),
        "S2A": Setting((*_SWIN_S2A, _QUANTIZED), all_but_biases),
    },
    "ConvNeXt-B": {
        "Full": Setting(FULL),
        "Linear": Setting(LINEAR),
        "Adapter": Setting(ADAPTER),
        "VPT": Setting((*LINEAR, InsertVisualPrompt(skip=1))),
        "UniPT": Setting((*LINEAR, AttachUniPT(reduction=8))),
        "LRP": Setting((*LINEAR, InsertLowRankPrompt(cells=7))),
        "Bias": Setting(BIAS),
        "Bias+LRP": Setting(_CONVNEXT_PROMPTED),
        "Bias+LRP+LSB": Setting(_CONVNEXT_S2A, all_but_biases_and_joined_columns),
        "S2A": Setting((*_CONVNEXT_S2A, _QUANTIZED), all_but_biases_and_joined_columns),
    },
}
"""Backbone -> method -> setting."""


@dataclass(frozen=True)
class Row:
    """A row of a table: what the paper gives of it, numbers as printed; Figure 5 is a drawing, its rows have none."""

    table: int
    backbone: str
    method: str
    figures: dict[str, str]
    setting: Setting


def _rows(table: int, columns: tuple[str, ...], texts: dict[str, str], settings: dict[str, str] | None = None) -> tuple[Row, ...]:
    """Rows from a text for each backbone, lines `method | figure | ...`; `settings`: whose setting a method of another name has."""
    rows = []
    for backbone, text in texts.items():
        for line in text.strip().splitlines():
            method, *figures = (part.strip() for part in line.split("|"))
            setting = SETTINGS[backbone][(settings or {}).get(method, method)]
            rows.append(Row(table, backbone, method, dict(zip(columns, figures, strict=True)), setting))
    return tuple(rows)


_ONE = (PERCENT, MEGABYTES, *ACCURACIES)
_TWO = (MEGABYTES, *ACCURACIES)
_TWO_NAMES = {"Unquantized": "Bias+LRP+LSB", "Quantized": "S2A"}
_THREE = (MILLIONS, *ACCURACIES)

TABLES: dict[int, tuple[Row, ...]] = {
    1: _rows(
        1,
        _ONE,
        {
            "ViT-B/16": """
                Full    | 100  | 4099 | 74.94 | 85.68 | 51.12 | 88.52
                Linear  | 0.09 | 344  | 68.26 | 82.16 | 35.50 | 85.77
                LoRA    | 2.15 | 2242 | 76.06 | 84.82 | 47.99 | 89.38
                Adapter | 4.24 | 2583 | 74.99 | 84.81 | 50.06 | 87.37
                VPT     | 0.63 | 2453 | 76.33 | 84.75 | 49.82 | 89.12
                UniPT   | 2.96 | 1472 | 76.45 | 85.73 | 50.63 | 89.24
                S2A     | 0.90 | 640  | 76.62 | 84.38 | 51.94 | 88.87
                """,
            "Swin-B": """
                Full    | 100  | 6390 | 80.02 | 86.81 | 57.39 | 90.83
                Linear  | 0.12 | 353  | 74.57 | 82.49 | 33.75 | 90.15
                Adapter | 2.15 | 3228 | 80.86 | 86.89 | 53.38 | 91.17
                VPT     | 0.79 | 3952 | 80.94 | 84.43 | 45.23 | 91.34
                UniPT   | 1.47 | 2068 | 81.11 | 84.94 | 52.74 | 90.49
                S2A     | 1.03 | 745  | 81.89 | 85.73 | 56.87 | 92.12
                """,
            "ConvNeXt-B": """
                Full    | 100  | 7171 | 81.10 | 86.71 | 51.26 | 91.36
                Linear  | 0.11 | 350  | 75.34 | 83.58 | 35.48 | 91.09
                Adapter | 2.0  | 3743 | 80.08 | 85.53 | 41.01 | 90.97
                VPT     | 1.28 | 3265 | 77.66 | 83.83 | 39.32 | 91.88
                UniPT   | 1.63 | 2783 | 82.04 | 86.29 | 54.68 | 91.96
                S2A     | 0.98 | 741  | 82.63 | 85.60 | 55.87 | 92.04
                """,
        },
    ),
    2: _rows(
        2,
        _TWO,
        {
            "ViT-B/16": """
                Unquantized | 2097 | 76.55 | 84.54 | 52.29 | 89.10
                Quantized | 640 | 76.62 | 84.38 | 51.94 | 88.87
                """,
            "Swin-B": """
                Unquantized | 2672 | 82.23 | 85.38 | 56.57 | 92.13
                Quantized | 745 | 81.89 | 85.73 | 56.87 | 92.12
                """,
            "ConvNeXt-B": """
                Unquantized | 2832 | 82.68 | 85.70 | 55.52 | 92.08
                Quantized | 741 | 82.63 | 85.60 | 55.87 | 92.04
                """,
        },
        _TWO_NAMES,
    ),
    3: _rows(
        3,
        _THREE,
        {
            "ViT-B/16": """
                VPT | 0.54 | 76.33 | 84.75 | 49.82 | 89.12
                LRP | 0.54 | 75.48 | 83.18 | 48.86 | 88.64
                """,
            "Swin-B": """
                VPT | 0.69 | 80.94 | 84.43 | 45.23 | 91.34
                LRP | 0.61 | 81.32 | 84.97 | 49.13 | 91.62
                """,
            "ConvNeXt-B": """
                VPT | 1.12 | 77.66 | 83.83 | 39.32 | 91.88
                LRP | 0.74 | 81.29 | 85.12 | 50.05 | 92.00
                """,
        },
    ),
    4: _rows(
        4,
        ACCURACIES,
        {
            "ViT-B/16": """
                Bias         | 75.38 | 83.41 | 45.66 | 87.58
                Bias+LRP     | 76.29 | 83.72 | 49.53 | 88.61
                Bias+LRP+LSB | 76.55 | 84.54 | 52.29 | 89.10
                """,
            "Swin-B": """
                Bias         | 80.73 | 85.18 | 48.31 | 90.59
                Bias+LRP     | 82.12 | 85.99 | 53.67 | 91.82
                Bias+LRP+LSB | 82.23 | 85.38 | 56.57 | 92.13
                """,
            "ConvNeXt-B": """
                Bias         | 80.19 | 83.86 | 50.46 | 91.15
                Bias+LRP     | 82.74 | 85.53 | 53.78 | 92.10
                Bias+LRP+LSB | 82.68 | 85.70 | 55.52 | 92.08
                """,
        },
    ),
    5: (
        *(
            Row(5, "ConvNeXt-B", f"LRP, r = {rank}", {}, Setting((*LINEAR, InsertLowRankPrompt(rank=rank, cells=7))))
            for rank in (5, 15, 30, 50, 70, 100)
        ),
        *(
            Row(5, "ConvNeXt-B", f"LSB, {r}x", {}, Setting((*LINEAR, AttachSideBranch(reduction=r, every=3))))
            for r in (16, 8, 4, 2, 1)
        ),
    ),
}
"""Table (5 is Figure 5) -> its rows."""

_NO_GRADIENT = "no gradient flows through the backbone: by the paper's own rule it then keeps nothing"
_COUNTERPARTS = "one adapter a block, of 1x1 convolutions and C/8; what the paper's convolutional 'counterparts' are is not told"

REASONS: dict[tuple[str, str, str], str] = {
    ("ViT-B/16", "VPT", MEGABYTES): "with 50 prompts every block has 247 tokens; the paper counts fewer",
    (
        "ViT-B/16",
        "UniPT",
        PERCENT,
    ): "the authors' network over 12 blocks and the final norm, m = C / 4; no divisor of C gives 2.96",
    ("ViT-B/16", "UniPT", MEGABYTES): _NO_GRADIENT,
    ("ViT-B/16", "LRP", MILLIONS): "prompts and head; with the biases, too, it would be 0.53",
    ("ViT-B/16", "Unquantized", MEGABYTES): "the paper's two rows differ by more than 7/8 of GELU's inputs and softmax's maps",
    ("Swin-B", "Linear", MEGABYTES): "weights and the head's input; what else the paper counts is not told",
    ("Swin-B", "Adapter", MEGABYTES): "the paper's parameters are those of one adapter a block, its memory is of more",
    ("Swin-B", "UniPT", MEGABYTES): _NO_GRADIENT,
    ("ConvNeXt-B", "Adapter", PERCENT): _COUNTERPARTS,
    ("ConvNeXt-B", "Adapter", MEGABYTES): _COUNTERPARTS,
    ("ConvNeXt-B", "UniPT", PERCENT): "the authors' network for CNNs over four stages, m = 128",
    ("ConvNeXt-B", "UniPT", MEGABYTES): _NO_GRADIENT,
    ("ConvNeXt-B", "LRP", MILLIONS): "prompts of 49 rows in every block, and head; what else the paper counts is not told",
}
"""(backbone, method, column) -> why ours is not the paper's figure."""
