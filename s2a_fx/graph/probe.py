"""What a node does that no table tells: its function or module runs on fake tensors, and is watched."""

from typing import Any

import torch
from torch import fx, nn

from s2a_fx.graph import torch_internals
from s2a_fx.graph.calls import call_of
from s2a_fx.graph.fake import fake_copy, fake_tensor
from s2a_fx.graph.regions import Region
from s2a_fx.graph.torch_internals import FakeTensor, TorchDispatchMode, tree_leaves, tree_map_only


def may_draw(gm: nn.Module, node: fx.Node) -> bool:
    """Whether a node may draw random numbers in train mode: run a second time, it would draw others. A dropout of 0 does not.

    Args:
        gm: the graph module, or the module whose submodules its graph calls.
        node: any node; what calls no operator of torch's, and whose operands have no shapes (`meta["val"]`), may draw.
    """
    call = call_of(gm, node)
    if call is not None:
        return call.draws
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        if isinstance(module, Region):
            return any(may_draw(body, inner) for body in module.bodies() for inner in body.graph.nodes)
        return bool(module.draws) if hasattr(module, "draws") else _draws_when_run(node, module)
    return node.op == "call_function" and _makes_tensors(node) and _draws_when_run(node, node.target)


def keeps_nothing(node: fx.Node) -> bool:
    """Whether autograd keeps nothing of what a node's function reads and makes: it moves elements about, say."""
    if node.op != "call_function" or not _makes_tensors(node):
        return False
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> None:
        kept.append(tensor.detach())

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed)
    try:
        with torch_internals.neutral_state(), hooks:
            _run(node, node.target)
    except Exception:  # whatever a model's own code raises
        return False
    return not kept


class _SeesDraws(TorchDispatchMode):
    drew = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.drew = self.drew or torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


def _draws_when_run(node: fx.Node, function: Any) -> bool:
    try:
        with torch_internals.neutral_state(), _SeesDraws() as seen:
            _run(node, function)
    except Exception:  # whatever a model's own code raises
        return True
    return seen.drew


def _run(node: fx.Node, function: Any) -> None:
    """Call a node's function or module, in train mode, on fake operands that need gradients."""
    operands = {o: o.meta["val"] for o in node.all_input_nodes}
    mode = next(leaf.fake_mode for leaf in tree_leaves(list(operands.values())) if isinstance(leaf, FakeTensor))
    with mode:
        fresh = {o: tree_map_only(FakeTensor, lambda fake: _leaf(fake, mode), value) for o, value in operands.items()}
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), fresh.__getitem__)
        if isinstance(function, nn.Module):
            tensors = [*function.parameters(), *function.buffers()]
            function = fake_copy(function, {id(t): fake_tensor(t, mode) for t in tensors}).train()
        function(*args, **kwargs)


def _leaf(fake: torch.Tensor, mode: Any) -> torch.Tensor:
    return fake_tensor(fake, mode).requires_grad_(fake.is_floating_point() or fake.is_complex())


def _makes_tensors(node: fx.Node) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(node.meta.get("val")))
