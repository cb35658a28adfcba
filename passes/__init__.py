"""Rewrites graphs: one pass a file, each a frozen dataclass whose fields are its options."""

from s2a_fx.passes.attach_side_branch import AttachSideBranch
from s2a_fx.passes.base import Pass
from s2a_fx.passes.compress_activations import CompressActivations
from s2a_fx.passes.freeze_weights import FreezeWeights
from s2a_fx.passes.fuse_attention import FuseAttention
from s2a_fx.passes.insert_low_rank_prompt import InsertLowRankPrompt
from s2a_fx.passes.quantize_non_parametric import QuantizeNonParametric
from s2a_fx.passes.recompute_branches import RecomputeBranches

PASSES: tuple[type[Pass], ...] = (
    FreezeWeights,
    InsertLowRankPrompt,
    AttachSideBranch,
    QuantizeNonParametric,
    FuseAttention,
    RecomputeBranches,
    CompressActivations,
)
"""Every pass that comes with the library."""

__all__ = [
    "PASSES",
    "AttachSideBranch",
    "CompressActivations",
    "FreezeWeights",
    "FuseAttention",
    "InsertLowRankPrompt",
    "Pass",
    "QuantizeNonParametric",
    "RecomputeBranches",
]
