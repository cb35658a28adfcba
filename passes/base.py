"""What a pass is, and the checks that passes share.

A pass is a frozen dataclass that is called with a graph module and returns torch.fx's `PassResult(graph_module, modified)`; it
therefore runs in torch.fx's own `PassManager` too. It edits the graph module that it is given. What it leaves alone, and why, it
writes down with `add_note`.
"""

import abc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from s2a_fx.errors import InputError, PassError
from s2a_fx.graph import torch_internals
from s2a_fx.graph.caches import without_caches
from s2a_fx.graph.flow import eliminate_dead_code
from s2a_fx.graph.metadata import record_of
from s2a_fx.graph.scopes import close_scopes, open_scopes
from s2a_fx.graph.shapes import propagate
from s2a_fx.graph.torch_internals import FakeTensor


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
                "or call s2a_fx.graph.shapes.propagate(gm, example_inputs) first."
            )
        record_of(graph_module)  # counts the model's parameters before the pass adds any
        with torch_internals.neutral_state(), without_caches(graph_module):
            opened = open_scopes(graph_module)
            try:
                if opened:
                    propagate(graph_module)
                modified = self.rewrite(graph_module)
            finally:
                if opened:  # also where the pass fails: a caller's graph still runs
                    close_scopes(graph_module)
                    graph_module.recompile()
            if modified or opened:
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
