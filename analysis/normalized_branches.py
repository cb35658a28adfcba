"""Residual branches that begin with a normalization: what can be recomputed from the normalized input alone.

    x -> norm -> ... -> (+ x)      the nodes from the norm to the last before the add, read from nowhere else

A branch may read parameters, and what is made of parameters alone (a table of relative positions), from outside.
"""

import heapq
import operator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers.drop import drop_path
from torch import fx, nn

from s2a_fx.analysis.activations import dropout_probability
from s2a_fx.graph import torch_internals
from s2a_fx.graph.calls import call_of, canonical, operator_of
from s2a_fx.graph.flow import attribute, dependent_nodes
from s2a_fx.graph.leaf import only_drops, only_rearranges
from s2a_fx.graph.regions import modules_within
from s2a_fx.nn.ghost import can_be_ghost
from s2a_fx.nn.random_numbers import may_draw
from s2a_fx.nn.recomputed_branch import Norm

_REARRANGES = (torch.roll, operator.getitem)
"""Beside views: what returns elements of its operand, and computes nothing of them."""

_COMBINES = frozenset(
    map(
        canonical,
        (
            torch.mean, torch.sum, torch.amax, torch.amin, torch.max, torch.min, torch.var, torch.std, torch.prod, torch.logsumexp,
            torch.cumsum, torch.norm, torch.linalg.vector_norm, F.normalize, F.softmax, F.log_softmax, torch.flip, torch.roll,
        ),
    )
)  # fmt: skip
"""Operators that let elements meet along the dimensions that they are given, or along all of them."""


@dataclass(frozen=True)
class NormalizedBranch:
    """A branch that can be recomputed from its normalized input.

    Attributes:
        norm: the node that normalizes; `rule` is its arithmetic, `source` what it reads, `weight` and `bias` the names of its
            parameters (None without).
        nodes: the branch without the norm, in order; the last is its output.
        operands: what it reads from outside: parameters, what is made of them for others too, and sizes.
        tail: its last linear layer, if only views follow it: its output's values are not needed to recompute.
        by_image: whether every image can run alone: no sizes are read from outside, nothing mixes the batch or draws.
    """

    norm: fx.Node
    rule: Norm
    source: fx.Node
    weight: str | None
    bias: str | None
    nodes: tuple[fx.Node, ...]
    operands: tuple[fx.Node, ...]
    tail: fx.Node | None
    by_image: bool

    @property
    def output(self) -> fx.Node:
        return self.nodes[-1]


def normalized_branches(gm: fx.GraphModule) -> tuple[NormalizedBranch, ...]:
    """The branches, in the order in which they run; they do not overlap."""
    order = {node: index for index, node in enumerate(gm.graph.nodes)}
    dependent = dependent_nodes(gm)
    found: list[NormalizedBranch] = []
    taken: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node not in taken and (branch := _branch(gm, node, order, dependent)):
            found.append(branch)
            taken.update(branch.nodes)
    return tuple(found)


def normalization(gm: fx.GraphModule, node: fx.Node) -> tuple[Norm, str | None, str | None] | None:
    """The rule of a layer or RMS norm over the last dimension, and the names of its weight and bias; None for other nodes."""
    call = call_of(gm, node)
    if call is None or call.operator not in (F.layer_norm, F.rms_norm):
        return None
    weight, bias = (call.path_of(name) for name in ("weight", "bias"))
    computed = sum(name in call.operands for name in ("weight", "bias")) > sum(path is not None for path in (weight, bias))
    if computed or len(call.options["normalized_shape"]) != 1 or call.options["eps"] is None:
        return None
    return Norm(float(call.options["eps"]), call.operator is F.layer_norm), weight, bias


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _holds_tensors(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return _is_tensor(node) or (isinstance(value, list | tuple) and any(isinstance(v, torch.Tensor) for v in value))


def _branch(gm: fx.GraphModule, norm: fx.Node, order: dict[fx.Node, int], dependent: set[fx.Node]) -> NormalizedBranch | None:
    described = normalization(gm, norm)
    if described is None:
        return None
    region = _region(norm, order, dependent)
    output = _output(gm, norm, region, order, dependent)
    if output is None:
        return None
    inside = _ancestors(output, region)
    inside |= _made_of_parameters(inside, order, dependent)
    nodes = tuple(sorted(inside - {norm}, key=order.__getitem__))
    if any(n.op == "call_module" and any(map(runs_once, modules_within(gm.get_submodule(str(n.target))))) for n in nodes):
        return None
    operands = tuple(dict.fromkeys(o for n in nodes for o in n.all_input_nodes if o not in inside))
    tail = _tail(gm, nodes, inside)
    draws = any(may_draw(gm, n) for n in nodes)
    batch = next(n for n in gm.graph.nodes if n.op == "placeholder").meta["val"].shape[0]
    by_image = (
        norm.meta["val"].shape[0] == output.meta["val"].shape[0] == batch
        and norm.meta["val"].shape[1] != batch  # or the first dimension may be the tokens'
        and not any(o in dependent for o in operands)
        and not draws
        and not any(_mixes_images(gm, n) for n in nodes)
    )
    return NormalizedBranch(norm, described[0], norm.all_input_nodes[0], *described[1:], nodes, operands, tail, by_image)


def _region(norm: fx.Node, order: dict[fx.Node, int], dependent: set[fx.Node]) -> set[fx.Node]:
    """All that is computed from the norm's output, parameters and sizes alone."""
    region = {norm}
    waiting = [(order[user], user) for user in norm.users]
    seen = {norm, *norm.users}
    heapq.heapify(waiting)
    while waiting:  # in the order of the graph: a node comes after all that it reads
        _, node = heapq.heappop(waiting)
        if node.op == "output" or any(o not in region and o in dependent and _holds_tensors(o) for o in node.all_input_nodes):
            continue
        region.add(node)
        for user in node.users:
            if user not in seen:
                seen.add(user)
                heapq.heappush(waiting, (order[user], user))
    return region


def _ancestors(output: fx.Node, region: set[fx.Node]) -> set[fx.Node]:
    found, stack = {output}, [output]
    while stack:
        for operand in stack.pop().all_input_nodes:
            if operand in region and operand not in found:
                found.add(operand)
                stack.append(operand)
    return found


def _made_of_parameters(inside: set[fx.Node], order: dict[fx.Node, int], dependent: set[fx.Node]) -> set[fx.Node]:
    """What is made of parameters for these nodes alone: cheaper to make again than to keep."""
    found: set[fx.Node] = set()
    waiting = [(-order[o], o) for o in {o for n in inside for o in n.all_input_nodes} - inside]
    heapq.heapify(waiting)
    while waiting:  # from the last to the first: a node comes after all that read it
        _, node = heapq.heappop(waiting)
        if node in found or node in dependent or node.op == "get_attr":
            continue
        if all(user in inside or user in found for user in node.users):
            found.add(node)
            for operand in node.all_input_nodes:
                heapq.heappush(waiting, (-order[operand], operand))
    return found


def _output(
    gm: fx.GraphModule, norm: fx.Node, region: set[fx.Node], order: dict[fx.Node, int], dependent: set[fx.Node]
) -> fx.Node | None:
    """The last node through which alone the region is read, less what follows it and keeps nothing; None if no add reads it."""
    for node in sorted(region - {norm}, key=order.__getitem__, reverse=True):
        if not _is_tensor(node) or not _feeds_add(gm, node, region):
            continue
        inside = _ancestors(node, region)
        if norm in inside and all(user in inside for n in inside - {node} for user in n.users):
            return _trimmed(gm, node, norm, dependent)
    return None


def _feeds_add(gm: fx.GraphModule, node: fx.Node, region: set[fx.Node]) -> bool:
    """Whether every reader adds the node to another activation."""
    return bool(node.users) and all(
        operator_of(gm, user) is torch.add and any(o not in region and _is_tensor(o) for o in user.all_input_nodes)
        for user in node.users
    )


def _trimmed(gm: fx.GraphModule, node: fx.Node, norm: fx.Node, dependent: set[fx.Node]) -> fx.Node | None:
    """Step back over dropouts, identities and scales: outside the branch they keep next to nothing, inside they would run twice."""
    while node is not norm:
        operands = [o for o in node.all_input_nodes if not _is_frozen(gm, o, dependent)]
        if not _keeps_nothing(gm, node, dependent) or len(operands) != 1 or len(operands[0].users) != 1:
            return node
        node = operands[0]
    return None


def _keeps_nothing(gm: fx.GraphModule, node: fx.Node, dependent: set[fx.Node]) -> bool:
    call = call_of(gm, node)
    if call is None:  # a model's own drop path
        return node.op == "call_module" and not list(gm.get_submodule(str(node.target)).parameters()) and only_drops(gm, node)
    if call.operator is torch.mul:
        return any(_is_frozen(gm, o, dependent) for o in node.all_input_nodes)
    return call.operator is drop_path or dropout_probability(call) is not None


def _is_frozen(gm: fx.GraphModule, node: fx.Node, dependent: set[fx.Node]) -> bool:
    """Whether a node is made of frozen parameters and buffers alone."""
    if node.op == "get_attr":
        return not attribute(gm, str(node.target)).requires_grad
    return node not in dependent and all(_is_frozen(gm, o, dependent) for o in node.all_input_nodes)


def _tail(gm: fx.GraphModule, nodes: tuple[fx.Node, ...], inside: set[fx.Node]) -> fx.Node | None:
    """The linear layer that only views follow, up to the branch's output."""
    node = nodes[-1]
    while True:
        if (
            node.op == "call_module"
            and isinstance(linear := gm.get_submodule(str(node.target)), nn.Linear)
            and can_be_ghost(linear)
        ):
            return node if len(node.users) == 1 or node is nodes[-1] else None
        sources = [o for o in node.all_input_nodes if o in inside and _is_tensor(o)]
        if len(sources) != 1 or not _is_view(gm, node) or any(u not in inside for u in sources[0].users):
            return None
        if len([u for u in sources[0].users if _holds_tensors(u)]) != 1:
            return None
        node = sources[0]


def _is_view(gm: fx.GraphModule, node: fx.Node) -> bool:
    call = call_of(gm, node)
    if call is None:  # the windows of a Swin, which timm does not let a trace see through
        return node.op == "call_function" and only_rearranges(gm, node)
    return call.is_view or call.operator in _REARRANGES or dropout_probability(call) is not None


def runs_once(module: nn.Module) -> bool:
    """Whether a module must not run a second time on codes: it counts its batches, or draws where x < 0."""
    counts = isinstance(module, torch_internals.RunningNorm) and (
        module.track_running_stats or isinstance(module, torch_internals.BatchNorm)
    )
    return counts or isinstance(module, nn.RReLU) or torch_internals.changes_with_each_run(module)


def _mixes_images(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node may reach across the first dimension: a reduction, a softmax or a roll along it, or an attention module."""
    if node.op == "call_module" and isinstance(gm.get_submodule(str(node.target)), nn.MultiheadAttention):
        return True
    call = call_of(gm, node)
    if call is None or call.operator not in _COMBINES or "other" in call.operands:  # the larger of two tensors
        return False
    dims = call.options.get("dims", call.options.get("dim"))
    rank = call.input.meta["val"].ndim
    return dims in (None, ()) or any(dim % rank == 0 for dim in (dims if isinstance(dims, tuple) else (dims,)))
