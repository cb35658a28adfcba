"""Whether a part of a model draws random numbers: run a second time, or image by image, it would draw others."""

import torch
from torch import fx, nn

from s2a_fx.graph.calls import draws
from s2a_fx.graph.leaf import leaf_calls
from s2a_fx.graph.regions import Region


class Drawing(nn.Module):
    """Base of this package's modules that draw random numbers in train mode."""

    def draws(self) -> bool:
        """Whether it draws; not with a probability of 0."""
        raise NotImplementedError


def may_draw(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node may draw random numbers in train mode; a dropout of 0 does not."""
    module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
    if isinstance(module, Region):
        return any(may_draw(body, inner) for body in module.bodies() for inner in body.graph.nodes)
    if isinstance(module, Drawing):
        return module.draws()
    known = draws(gm, node)
    if known is not None or node.op in ("placeholder", "get_attr", "output") or _is_plain(node):
        return bool(known)
    calls = leaf_calls(gm, node)
    return calls is None or calls.draws


def _is_plain(node: fx.Node) -> bool:
    """Whether a node's value is no tensor, as that of `x.shape` is none."""
    return not isinstance(node.meta.get("val"), torch.Tensor | list | tuple | dict | None)
