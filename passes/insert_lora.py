"""Add a trained matrix of low rank to frozen layers (LoRA; the paper's eq. 15).

    before  y = layer(x)
    after   y = layer(x) + B(A(x)) * alpha / rank      keeps x and A(x)

Leaves alone, with a note: layers that are neither linear nor a convolution of one group.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import fx, nn

from s2a_fx.analysis.blocks import residual_blocks
from s2a_fx.analysis.flow import reaches
from s2a_fx.analysis.non_parametric import non_parametric
from s2a_fx.analysis.notes import add_note
from s2a_fx.analysis.provenance import owner_path
from s2a_fx.errors import InputError, PassError
from s2a_fx.nn.lora import LoRA
from s2a_fx.passes.base import Pass, a_weight, building_like, free_path, require_positive
from s2a_fx.passes.subgraphs import call_spliced


@dataclass(frozen=True)
class InsertLoRA(Pass):
    """Insert `LoRA` beside layers.

    Args:
        rank: of B A.
        alpha: numerator of the scale alpha / rank; None for `rank`, a scale of 1.
        targets: patterns over the paths of layers, or their last names, such as `qkv` or `blocks.*.fc1`. None: the layers that make
            queries, keys and values; in a model without attention the linear layers of its residual blocks; without those, too,
            their convolutions.
    """

    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        require_positive(self, rank=self.rank)
        if self.alpha is not None and not self.alpha > 0:
            raise InputError(f"InsertLoRA: alpha must be positive, got {self.alpha!r}.")
        if self.targets is not None and (isinstance(self.targets, str) or not self.targets):
            raise InputError(f"InsertLoRA: targets must be a tuple of patterns, such as ('qkv',), got {self.targets!r}.")

    def rewrite(self, gm: fx.GraphModule) -> bool:
        layers = _layers_by_rule(gm) if self.targets is None else self._named(gm)
        if not layers:
            raise PassError("InsertLoRA: found no layer to adapt: no attention and no residual block; say targets=.")
        inserted = [self._insert(gm, node) for node in layers]
        return any(inserted)

    def _named(self, gm: fx.GraphModule) -> list[fx.Node]:
        calls = [n for n in gm.graph.nodes if n.op == "call_module"]
        found: list[fx.Node] = []
        for pattern in self.targets or ():
            named = [n for n in calls if any(fnmatchcase(name, pattern) for name in _names(n))]
            if not named:
                examples = ", ".join(dict.fromkeys(_names(n)[1] for n in calls if _can_be_adapted(gm, n)))
                raise PassError(f"InsertLoRA: no layer is called {pattern!r}; there are {examples}.")
            found += named
        return sorted(dict.fromkeys(found))

    def _insert(self, gm: fx.GraphModule, node: fx.Node) -> bool:
        if not _can_be_adapted(gm, node):
            add_note(gm, "InsertLoRA", node.name, "neither a linear layer nor a convolution of one group")
            return False
        layer: Any = gm.get_submodule(str(node.target))
        path = free_path(gm, owner_path(node), f"{_names(node)[1]}_lora")
        with building_like(a_weight(gm)) as factory:
            lora = LoRA(layer, self.rank, 1.0 if self.alpha is None else self.alpha / self.rank, **factory)
        readers = list(node.users)
        adapted = call_spliced(gm, path, lora, (node.all_input_nodes[0], node), before=node.next, like=node)
        adapted.meta["val"] = node.meta["val"]
        for reader in readers:
            reader.replace_input_with(node, adapted)
        return True


def _names(node: fx.Node) -> tuple[str, str]:
    return str(node.target), str(node.target).rpartition(".")[2]


def _can_be_adapted(gm: fx.GraphModule, node: fx.Node) -> bool:
    layer = gm.get_submodule(str(node.target))
    return isinstance(layer, nn.Linear) or (type(layer) is nn.Conv2d and layer.groups == 1)


def _layers_by_rule(gm: fx.GraphModule) -> list[fx.Node]:
    adapted = [n for n in gm.graph.nodes if n.op == "call_module" and _can_be_adapted(gm, n)]
    in_blocks = {node for block in residual_blocks(gm) for node in block.nodes}
    linear = [n for n in adapted if isinstance(gm.get_submodule(str(n.target)), nn.Linear)]
    of_blocks = [n for n in linear if n in in_blocks] or [n for n in adapted if n in in_blocks]
    return _of_attention(gm, linear) or of_blocks


def _of_attention(gm: fx.GraphModule, layers: list[fx.Node]) -> list[fx.Node]:
    """The layers in the same module as an attention, but those that read its output."""
    maps: dict[str, fx.Node] = {}
    for node in gm.graph.nodes:
        layer = non_parametric(gm, node)
        if layer is not None and layer.kind in ("softmax", "attention"):
            maps[owner_path(node)] = node
    return [n for n in layers if owner_path(n) in maps and not reaches(n, {maps[owner_path(n)]})]
