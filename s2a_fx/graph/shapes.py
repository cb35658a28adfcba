"""Shapes and dtypes of every node, from fake tensors."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import fx, nn
from torch.func import functional_call

from s2a_fx.graph.fake import fake_copy, fake_mode, fake_tensor, needs_fake_copy, traced_inputs
from s2a_fx.graph.regions import Region, in_scopes
from s2a_fx.graph.torch_internals import FakeTensor, FakeTensorMode, tree_leaves


def propagate(gm: fx.GraphModule, inputs: Sequence[torch.Tensor] | None = None) -> None:
    """Write `node.meta["val"]`, a fake tensor or a structure of them, on the nodes of `gm`.

    Args:
        gm: the graph, its weights real, fake or meta.
        inputs: example inputs, from which all nodes are computed. Left out, only nodes without a value are: those which a pass has
            just inserted. A pass that changes the shape of a node deletes the value of that node and of those below.
    """
    if inputs is not None:
        mode = fake_mode()
        given = iter(inputs)
        for node in gm.graph.nodes:
            node.meta.pop("val", None)
            if node.op == "placeholder":
                node.meta["val"] = fake_tensor(next(given), mode)
    else:
        mode = traced_inputs(gm)[0].fake_mode  # type: ignore[attr-defined]
    faked: dict[int, Any] = {}  # parameters already faked; also what deepcopy must not copy
    with mode, torch.no_grad():
        for node in gm.graph.nodes:
            if "val" not in node.meta:
                with in_scopes(node, "autocast"):
                    node.meta["val"] = _value(gm, node, mode, faked)


def compute(gm: fx.GraphModule, node: fx.Node, watch: AbstractContextManager[Any]) -> Any:
    """What a node computes of its operands' fake values, without gradients, inside `watch`; its own value stays as it is."""
    operands = [operand.meta.get("val") for operand in node.all_input_nodes]
    mode = next((v.fake_mode for v in tree_leaves(operands) if isinstance(v, FakeTensor)), None) or fake_mode()
    with mode, torch.no_grad(), watch:
        return _value(gm, node, mode, {})


def _value(gm: fx.GraphModule, node: fx.Node, mode: FakeTensorMode, faked: dict[int, Any]) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda operand: operand.meta["val"])
    target: Any = node.target
    if node.op == "output":
        return args[0]
    if node.op == "get_attr":
        return _fake_attribute(gm, target, mode, faked)
    if node.op == "call_method":
        return getattr(args[0], target)(*args[1:], **kwargs)
    if node.op == "call_module":
        return _call_module(gm, gm.get_submodule(target), args, kwargs, mode, faked)
    return target(*args, **kwargs)


def _call_module(gm: fx.GraphModule, module: nn.Module, args: Any, kwargs: Any, mode: FakeTensorMode, faked: dict[int, Any]) -> Any:
    """What a module returns with fake tensors in the place of its own."""
    owner = gm if isinstance(module, Region) else module  # a region's tensors are registered where the model has them
    own = {}
    for name, tensor in [*owner.named_parameters(), *owner.named_buffers()]:
        if id(tensor) not in faked:
            faked[id(tensor)] = fake_tensor(tensor, mode)
        own[name] = faked[id(tensor)]
    if isinstance(module, Region) or needs_fake_copy(module):
        return fake_copy(module, faked)(*args, **kwargs)
    return functional_call(module, own, args, kwargs)  # a tenth of a copy's time


def _fake_attribute(gm: fx.GraphModule, target: str, mode: FakeTensorMode, faked: dict[int, Any]) -> Any:
    value: Any = gm
    for name in target.split("."):
        value = getattr(value, name)
    if isinstance(value, torch.Tensor):
        return faked.setdefault(id(value), fake_tensor(value, mode))
    return value
