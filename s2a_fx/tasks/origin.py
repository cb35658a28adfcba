"""Where a rewritten model comes from: the model's name, the passes that it went through, and what they left to train."""

from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from s2a_fx.graph.metadata import Origin, find_record, record_of


def origin_of(model: nn.Module) -> Origin | None:
    """Where a rewritten model comes from; None for any other model."""
    record = find_record(model)
    return None if record is None else record.origin


def note_origin(rewritten: fx.GraphModule, source: nn.Module, passes: Sequence[str]) -> None:
    """Say that `rewritten` is `source` after so many more passes."""
    before = origin_of(source)
    model, earlier = (_name(source), ()) if before is None else (before.model, before.passes)
    trained = tuple(name for name, parameter in rewritten.named_parameters() if parameter.requires_grad)
    record_of(rewritten).origin = Origin(model, (*earlier, *passes), trained)


def _name(model: nn.Module) -> str:
    """timm's name of the model, or that of its class."""
    config: Any = getattr(model, "pretrained_cfg", None)
    architecture = config.get("architecture") if hasattr(config, "get") else None
    return architecture or type(model).__name__
