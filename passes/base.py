"""What a pass is, and the few edits that passes share.

A pass is a frozen dataclass that is called with a graph module and returns torch.fx's `PassResult(graph_module, modified)`; it
therefore runs in torch.fx's own `PassManager` too. It edits the graph module that it is given. What it leaves alone, and why, it
writes down with `add_note`.
"""

import abc
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.passes.infra.pass_base import PassResult

from s2a_fx.analysis.flow import attribute, eliminate_dead_code
from s2a_fx.analysis.provenance import module_stack, owner_path
from s2a_fx.analysis.shapes import propagate
from s2a_fx.errors import InputError, PassError


@dataclass(frozen=True)
class Pass(abc.ABC):
    """Base of the passes. A subclass is a frozen dataclass and defines `rewrite`."""

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Apply the pass to `graph_module`, in place.

        Raises:
            PassError: the pass does not fit this graph; the message names the node and what to do. Some passes have edited a part
                of the graph by then: `transform` works on a copy.
        """
        if any("val" not in node.meta for node in graph_module.graph.nodes):
            raise PassError(
                f"{type(self).__name__}: the graph carries no shapes; make it with s2a_fx.trace(model, example_inputs), "
                "or call s2a_fx.analysis.shapes.propagate(gm, example_inputs) first."
            )
        modified = self.rewrite(graph_module)
        if modified:
            eliminate_dead_code(graph_module)
            graph_module.graph.lint()
            graph_module.recompile()
            propagate(graph_module)
        return PassResult(graph_module, modified)

    @abc.abstractmethod
    def rewrite(self, gm: fx.GraphModule) -> bool:
        """Edit `gm`; return whether anything changed."""


def require_positive(source: Pass, **options: int) -> None:
    """Raise `InputError` unless every option is a positive integer."""
    for name, value in options.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{type(source).__name__}: {name} must be a positive integer, got {value!r}.")


def require_not_negative(source: Pass, **options: int) -> None:
    """Raise `InputError` unless every option is an integer of 0 or more."""
    for name, value in options.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise InputError(f"{type(source).__name__}: {name} must be an integer of 0 or more, got {value!r}.")


def free_path(gm: fx.GraphModule, parent: str, name: str) -> str:
    """A path under `parent` where nothing stands yet: `parent.name`, or with a number."""
    wanted = path = f"{parent}.{name}" if parent else name
    count = 1
    while _is_taken(gm, path):
        path = f"{wanted}_{count}"
        count += 1
    return path


def _is_taken(gm: fx.GraphModule, path: str) -> bool:
    try:
        attribute(gm, path)
    except AttributeError:
        return False
    return True


def snake_case(kind: type) -> str:
    """The name of a class in lower case, its words joined by underscores: `CodedLayerNorm` -> `coded_layer_norm`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.__name__).lower()


def call_inserted(gm: fx.GraphModule, path: str, module: nn.Module, args: tuple[Any, ...], like: fx.Node | None = None) -> fx.Node:
    """Put `module` at `path` and call it at the present insertion point; it trains or not as the graph module does.

    The new node's provenance is that of `like`, if it belongs where that stands, and the path.
    """
    gm.add_submodule(path, module.train(gm.training))
    node = gm.graph.call_module(path, args)
    around = module_stack(like) if like is not None else []
    if like is not None and like.op == "call_module" and around and around[-1][0] == like.target:
        around = around[:-1]
    node.meta["nn_module_stack"] = {place: (place, kind) for place, kind in [*around, (path, type(module))]}
    return node


def replaced(
    gm: fx.GraphModule,
    node: fx.Node,
    module: nn.Module,
    operands: tuple[Any, ...],
    path: str | None = None,
    before: fx.Node | None = None,
) -> fx.Node:
    """Replace `node` by a call of `module` on `operands`, put at `path` or at a free one beside it; returns the call.

    The call stands where the node stood, or `before` an earlier one.
    """
    with gm.graph.inserting_before(before or node):
        call = call_inserted(gm, path or free_path(gm, owner_path(node), snake_case(type(module))), module, operands, like=node)
    call.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(call)
    gm.graph.erase_node(node)
    return call


@contextmanager
def building_like(reference: torch.Tensor) -> Iterator[dict[str, Any]]:
    """Build parameters where and how `reference` is: yields `device` and `dtype`, under its fake mode if it is fake."""
    factory = {"device": reference.device, "dtype": reference.dtype}
    if isinstance(reference, FakeTensor):
        with reference.fake_mode:
            yield factory
    else:
        yield factory


def a_weight(gm: fx.GraphModule) -> torch.Tensor:
    """A floating parameter of the model, whose device and dtype new parameters take."""
    for parameter in gm.parameters():
        if parameter.is_floating_point():
            return parameter
    raise PassError("the model has no parameters: there is nothing to tune beside. Pass a model with weights.")
