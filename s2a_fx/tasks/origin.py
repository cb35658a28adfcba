"""Where a rewritten model comes from: the model's name, the passes that it went through, and what they left to train.

A child module without tensors holds it: of all that a `GraphModule` may carry, its children alone survive both `copy.deepcopy` and
pickling.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

_PATH = "s2a_fx_origin"


class Origin(nn.Module):
    """The model's name, each pass with all its options, in the order in which they were applied, and the parameters that they left
    trainable, by name."""

    def __init__(self, model: str, passes: tuple[str, ...], trained: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.passes, self.trained = model, passes, trained

    def extra_repr(self) -> str:
        return ", ".join((self.model, *self.passes))


def origin_of(model: nn.Module) -> Origin | None:
    """Where a rewritten model comes from; None for any other model."""
    found = getattr(model, _PATH, None)
    return found if isinstance(found, Origin) else None


def note_origin(rewritten: nn.Module, source: nn.Module, passes: Sequence[str]) -> None:
    """Say that `rewritten` is `source` after so many more passes."""
    before = origin_of(source)
    model, earlier = (_name(source), ()) if before is None else (before.model, before.passes)
    trained = tuple(name for name, parameter in rewritten.named_parameters() if parameter.requires_grad)
    rewritten.add_module(_PATH, Origin(model, (*earlier, *passes), trained))


def _name(model: nn.Module) -> str:
    """timm's name of the model, or that of its class."""
    config: Any = getattr(model, "pretrained_cfg", None)
    architecture = config.get("architecture") if hasattr(config, "get") else None
    return architecture or type(model).__name__
