"""Add a trained matrix of low rank to frozen layers (LoRA; the paper's eq. 15).

    before  y = layer(x)
    after   y = layer(x) + B(A(x)) * alpha / rank      keeps x and A(x)

The authors adapt the weights of queries and values; where one layer makes keys, too, all three share A here, as in PEFT.

Leaves alone, with a note: layers that are neither linear nor a plain convolution of one group.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import fx, nn

from s2a_fx.analysis.attention_map import computes_map
from s2a_fx.errors import InputError, PassError
from s2a_fx.graph.calls import call_of
from s2a_fx.graph.edit import free_path, splice_module
from s2a_fx.graph.flow import dependent_nodes, reaches
from s2a_fx.graph.metadata import add_note
from s2a_fx.graph.provenance import owner_path
from s2a_fx.graph.structure import residual_blocks
from s2a_fx.nn.lora import LoRA
from s2a_fx.passes.base import Pass, building_like, require_positive


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
        if self.alpha is not None and not (isinstance(self.alpha, int | float) and self.alpha > 0):
            raise InputError(f"InsertLoRA: alpha must be a positive number, got {self.alpha!r}.")
        if self.targets is not None and (not isinstance(self.targets, tuple) or not self.targets):
            raise InputError(f"InsertLoRA: targets must be a tuple of patterns, such as ('qkv',), got {self.targets!r}.")

    def rewrite(self, gm: fx.GraphModule) -> bool:
        layers = _layers_by_rule(gm) if self.targets is None else self._named(gm)
        if not layers:
            raise PassError(
                "InsertLoRA: found no layer to adapt: none that makes queries, keys and values of an attention, and no residual "
                "block without attention; say targets=, and apply the pass before those that compress or checkpoint."
            )
        adapted: dict[str, str] = {}
        for node in layers:
            self._insert(gm, node, adapted)
        if not adapted:
            raise PassError(
                "InsertLoRA: of the layers that targets= names none is linear or a plain convolution of one group; name others."
            )
        return True

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

    def _insert(self, gm: fx.GraphModule, node: fx.Node, adapted_paths: dict[str, str]) -> None:
        if not _can_be_adapted(gm, node):
            add_note(gm, "InsertLoRA", node.name, "neither a linear layer nor a plain convolution of one group")
            return
        layer: Any = gm.get_submodule(str(node.target))
        known = adapted_paths.get(str(node.target))  # a layer called twice is adapted alike
        path = known or free_path(gm, owner_path(node), f"{_names(node)[1]}_lora")
        adapted_paths[str(node.target)] = path
        with building_like(layer.weight) as factory:
            scale = 1.0 if self.alpha is None else self.alpha / self.rank
            lora = gm.get_submodule(known) if known else LoRA(layer, self.rank, scale, **factory)
        readers = list(node.users)
        adapted = splice_module(gm, path, lora, (node.all_input_nodes[0], node), before=node.next, like=node)
        adapted.meta["val"] = node.meta["val"]
        for reader in readers:
            reader.replace_input_with(node, adapted)


def _names(node: fx.Node) -> tuple[str, str]:
    return str(node.target), str(node.target).rpartition(".")[2]


def _can_be_adapted(gm: fx.GraphModule, node: fx.Node) -> bool:
    layer = gm.get_submodule(str(node.target))
    plain = type(layer) is nn.Conv2d and layer.groups == 1 and layer.padding_mode == "zeros"
    return isinstance(layer, nn.Linear) or plain


def _layers_by_rule(gm: fx.GraphModule) -> list[fx.Node]:
    adapted = [n for n in gm.graph.nodes if n.op == "call_module" and _can_be_adapted(gm, n)]
    in_blocks = {node for block in residual_blocks(gm) for node in block.nodes}
    linear = [n for n in adapted if isinstance(gm.get_submodule(str(n.target)), nn.Linear)]
    maps = _attentions(gm)
    if maps:
        return [n for n in linear if owner_path(n) in maps and _makes_what_it_reads(n, maps[owner_path(n)], dependent_nodes(gm))]
    return [n for n in linear if n in in_blocks] or [n for n in adapted if n in in_blocks]


def _attentions(gm: fx.GraphModule) -> dict[str, fx.Node]:
    """The attentions by the module that they stand in."""
    return {owner_path(node): node for node in gm.graph.nodes if computes_map(call_of(gm, node))}


def _makes_what_it_reads(layer: fx.Node, attention: fx.Node, dependent: set[fx.Node]) -> bool:
    """Whether a layer beside an attention makes queries, keys or values: of the input, and not of what the attention makes."""
    return layer in dependent and not reaches(layer, {attention})
