"""Whether a part of a model draws random numbers: run a second time, or image by image, it would draw others."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from s2a_fx.graph.regions import Region
from s2a_fx.graph.training_switch import TrainingSwitch

_ATTENTION = (F.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default)


def may_draw(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node may draw random numbers in train mode; a dropout of 0 does not."""
    if node.op != "call_module":
        return node.op in ("call_function", "call_method") and _call_may_draw(node, node.target)
    module = gm.get_submodule(str(node.target))
    if isinstance(module, TrainingSwitch):
        return module.function is not F.dropout or bool(_argument(node, 1, "p", 0.5))
    if isinstance(module, Region):
        return any(may_draw(body, inner) for body in module.bodies() for inner in body.graph.nodes)
    return any(isinstance(m, TrainingSwitch) or _drops(m) for m in module.modules())


def _call_may_draw(node: fx.Node, function: Any) -> bool:
    if function in _ATTENTION:
        return bool(_argument(node, 4, "dropout_p", 0.0))
    name = str(function)
    if "dropout" in name:
        return bool(_argument(node, 1, "p", 0.5))
    return "rand" in name or "bernoulli" in name or bool(node.kwargs.get("dropout_p"))


def _drops(module: nn.Module) -> bool:
    return any(getattr(module, name, 0) for name in ("p", "drop_prob", "dropout"))


def _argument(node: fx.Node, position: int, name: str, default: float) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
