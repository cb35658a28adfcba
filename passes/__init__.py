"""Rewrites graphs: one pass a file, each a frozen dataclass whose fields are its options."""

from s2a_fx.passes.attach_side_branch import AttachSideBranch
from s2a_fx.passes.base import Pass
from s2a_fx.passes.freeze_weights import FreezeWeights
from s2a_fx.passes.insert_low_rank_prompt import InsertLowRankPrompt
from s2a_fx.passes.quantize_non_parametric import QuantizeNonParametric

PASSES: tuple[type[Pass], ...] = (FreezeWeights, InsertLowRankPrompt, AttachSideBranch, QuantizeNonParametric)
"""Every pass that comes with the library."""

__all__ = ["PASSES", "AttachSideBranch", "FreezeWeights", "InsertLowRankPrompt", "Pass", "QuantizeNonParametric"]
