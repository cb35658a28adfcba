"""Recompute residual branches from the coded output of the norm that they begin with.

    before  x -> norm -> qkv -> attention -> proj       keeps x, q, k, v, output, logsumexp
    before  x -> norm -> fc1 -> GELU -> fc2             keeps x and GELU's input
    after   RecomputedBranch(x)                         keeps x_hat = (x - mean) / sigma at `bits` an element

What lies between a norm and the add is a function of x_hat: nothing else need be kept. The last linear layer is not run again.

Leaves alone, with a note, branches that no gradient flows through, and those that mix the batch (batch norm).
"""

from dataclasses import dataclass

import torch
from torch import fx

from s2a_fx.analysis.attention_map import attends
from s2a_fx.analysis.normalized_branches import NormalizedBranch, normalized_branches
from s2a_fx.codecs.packing import MULTIPLE
from s2a_fx.codecs.rows import Rows
from s2a_fx.errors import InputError
from s2a_fx.graph.edit import free_path, insert_call, snake_case
from s2a_fx.graph.flow import trained_nodes
from s2a_fx.graph.metadata import add_note
from s2a_fx.graph.provenance import owner_path
from s2a_fx.graph.regions import SCOPES, in_one_context, scopes_of
from s2a_fx.nn.ghost import extract_bodies
from s2a_fx.nn.recomputed_branch import RecomputedBranch
from s2a_fx.passes.base import Pass


@dataclass(frozen=True)
class RecomputeBranches(Pass):
    """Recompute residual branches in the backward, from a few bits of their normalized input.

    Args:
        bits: per element of the normalized input, 1 to 8.
        group: how many neighbours in a row share a range, where the width is a multiple of it; 0 for one range a row.
        kinds: which branches: `attention` (those with a softmax or an attention), `mlp` (all others), or both.
        widest: only branches of at most this many channels: the narrower, the less it costs to recompute a byte. 0 for all.
        part_mb: the branch runs over as many images at a time as keep its widest tensor below this many MB; 0 for all at once.
    """

    bits: int = 6
    group: int = 0
    kinds: tuple[str, ...] = ("attention", "mlp")
    widest: int = 0
    part_mb: int = 16

    def __post_init__(self) -> None:
        Rows(self.bits)
        if not self.kinds or not all(isinstance(n, int) and n >= 0 for n in (self.widest, self.part_mb, self.group)):
            raise InputError(
                f"RecomputeBranches: wanted some kinds, and widest, part_mb and group of 0 or more, got {self.kinds!r}, "
                f"{self.widest!r}, {self.part_mb!r} and {self.group!r}."
            )
        if self.group % MULTIPLE:
            raise InputError(f"RecomputeBranches: group must be 0 or a multiple of {MULTIPLE}, got {self.group!r}.")
        if unknown := set(self.kinds) - {"attention", "mlp"}:
            raise InputError(f"RecomputeBranches: got kinds {sorted(unknown)}, wanted attention, mlp or both.")

    def rewrite(self, gm: fx.GraphModule) -> bool:
        trained = trained_nodes(gm)
        modified = False
        for branch in normalized_branches(gm):
            reason = _refusal(gm, branch, trained)
            if reason:
                add_note(gm, "RecomputeBranches", branch.norm.name, reason)
            elif self._wanted(gm, branch):
                self._replace(gm, branch)
                modified = True
        return modified

    def _wanted(self, gm: fx.GraphModule, branch: NormalizedBranch) -> bool:
        width = branch.norm.meta["val"].shape[-1]
        return _kind(gm, branch) in self.kinds and (not self.widest or width <= self.widest)

    def _replace(self, gm: fx.GraphModule, branch: NormalizedBranch) -> None:
        body, backward_body = extract_bodies(gm, branch.nodes, (branch.norm, *branch.operands), branch.tail)
        width = branch.norm.meta["val"].shape[-1]
        module = RecomputedBranch(branch.rule, body, backward_body, self.bits, self._group(width), self._images(branch))
        with gm.graph.inserting_before(branch.norm):
            parameters = [name and gm.graph.get_attr(name) for name in (branch.weight, branch.bias)]
            for node in parameters:
                if isinstance(node, fx.Node):
                    node.meta.update(branch.norm.meta)
                    del node.meta["val"]
        with gm.graph.inserting_before(branch.output):
            path = free_path(gm, owner_path(branch.norm), snake_case(RecomputedBranch))
            call = insert_call(gm, path, module, (branch.source, *parameters, *branch.operands), like=branch.norm)
        call.meta["val"], call.meta[SCOPES] = branch.output.meta["val"], scopes_of(branch.norm)
        branch.output.replace_all_uses_with(call)
        for node in (*reversed(branch.nodes), branch.norm):
            gm.graph.erase_node(node)

    def _group(self, width: int) -> int:
        return self.group if self.group and width % self.group == 0 else width

    def _images(self, branch: NormalizedBranch) -> int:
        if not self.part_mb or not branch.by_image:
            return 0
        batch = branch.norm.meta["val"].shape[0]
        values = [n.meta["val"] for n in (branch.norm, *branch.nodes) if isinstance(n.meta["val"], torch.Tensor)]
        widest = max(v.numel() * v.element_size() for v in values) / batch
        return max(1, int(self.part_mb * 1e6 / widest))


def _kind(gm: fx.GraphModule, branch: NormalizedBranch) -> str:
    return "attention" if any(attends(gm, node) for node in branch.nodes) else "mlp"


def _refusal(gm: fx.GraphModule, branch: NormalizedBranch, trained: set[fx.Node]) -> str | None:
    width = branch.norm.meta["val"].shape[-1]
    if not in_one_context(branch.norm, *branch.nodes):
        return "its norm stands in another context than its layers: torch.no_grad() or autocast"
    if width % MULTIPLE:
        return f"{width} channels are not a multiple of {MULTIPLE}: codes could not be packed"
    last = branch.tail or branch.output  # a bias that trains there alone keeps nothing
    flows = not trained.isdisjoint(last.all_input_nodes) or _trains_its_weight(gm, last)
    return None if flows else "keeps nothing: no gradient flows through it"


def _trains_its_weight(gm: fx.GraphModule, node: fx.Node) -> bool:
    module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
    return module is not None and any(p.requires_grad and p.ndim > 1 for p in module.parameters())
