"""Freeze the weights and leave a few parameters trainable: biases and head, by rule (paper, section 3.1).

    before  y = W x + b      trains W and b: keeps x for W's gradient, eq. (2)
    after   y = W x + b      trains b alone: x is free (in linear layers; a convolution and a norm keep theirs)

Leaves the graph itself alone: only `requires_grad` changes.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import fx

from s2a_fx.errors import PassError
from s2a_fx.graph.heads import head_parameters
from s2a_fx.graph.metadata import add_note
from s2a_fx.passes.base import Pass


@dataclass(frozen=True)
class FreezeWeights(Pass):
    """Freeze every parameter but those that `keep` names.

    Args:
        keep: rules, any of which keeps a parameter trainable: `bias` (parameters named bias), `head` (the classification head),
            or a pattern over parameter names, such as `blocks.11.*`.
    """

    keep: tuple[str, ...] = ("bias", "head")

    def rewrite(self, gm: fx.GraphModule) -> bool:
        heads = head_parameters(gm) if "head" in self.keep else frozenset()
        self._check_patterns(gm)
        kept = {name for name, p in gm.named_parameters() if p.is_floating_point() and self._keeps(name, heads)}
        missing = "head" in self.keep and not heads
        if missing and not kept:
            raise PassError(
                "FreezeWeights: the model has no classification head (no linear layer from features to classes makes its "
                "output). Build it with num_classes > 0, or name what shall train, for example keep=('bias', 'neck.*')."
            )
        if missing:
            add_note(gm, "FreezeWeights", "", "the model has no classification head: its biases alone train")
        for name, parameter in gm.named_parameters():
            parameter.requires_grad_(name in kept)
        return True

    def _keeps(self, name: str, heads: frozenset[str]) -> bool:
        if "bias" in self.keep and (name.rpartition(".")[2] == "bias" or name.endswith("_bias")):
            return True
        return name in heads or any(fnmatchcase(name, pattern) for pattern in self.keep)

    def _check_patterns(self, gm: fx.GraphModule) -> None:
        names = [name for name, _ in gm.named_parameters()]
        for pattern in self.keep:
            if pattern not in ("bias", "head") and not any(fnmatchcase(name, pattern) for name in names):
                raise PassError(
                    f"FreezeWeights: no parameter matches {pattern!r}; the names begin {', '.join(names[:4])}, ... "
                    "Give 'bias', 'head', or a pattern over parameter names."
                )
