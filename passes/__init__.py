"""Rewrites graphs: one pass a file, each a frozen dataclass whose fields are its options."""

from s2a_fx.passes.attach_ladder import AttachLadder
from s2a_fx.passes.attach_side_branch import AttachSideBranch
from s2a_fx.passes.attach_unipt import AttachUniPT
from s2a_fx.passes.base import Pass
from s2a_fx.passes.checkpoint_blocks import CheckpointBlocks
from s2a_fx.passes.compress_activations import CompressActivations
from s2a_fx.passes.freeze_weights import FreezeWeights
from s2a_fx.passes.fuse_attention import FuseAttention
from s2a_fx.passes.insert_adapter import InsertAdapter
from s2a_fx.passes.insert_lora import InsertLoRA
from s2a_fx.passes.insert_low_rank_prompt import InsertLowRankPrompt
from s2a_fx.passes.insert_visual_prompt import InsertVisualPrompt
from s2a_fx.passes.quantize_non_parametric import QuantizeNonParametric
from s2a_fx.passes.recompute_branches import RecomputeBranches

PASSES: tuple[type[Pass], ...] = (
    FreezeWeights,
    InsertLoRA,
    InsertAdapter,
    InsertVisualPrompt,
    AttachUniPT,
    AttachLadder,
    InsertLowRankPrompt,
    AttachSideBranch,
    QuantizeNonParametric,
    FuseAttention,
    RecomputeBranches,
    CompressActivations,
    CheckpointBlocks,
)
"""Every pass that comes with the library."""

__all__ = [
    "PASSES",
    "AttachLadder",
    "AttachSideBranch",
    "AttachUniPT",
    "CheckpointBlocks",
    "CompressActivations",
    "FreezeWeights",
    "FuseAttention",
    "InsertAdapter",
    "InsertLoRA",
    "InsertLowRankPrompt",
    "InsertVisualPrompt",
    "Pass",
    "QuantizeNonParametric",
    "RecomputeBranches",
]
