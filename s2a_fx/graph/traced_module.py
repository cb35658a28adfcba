"""The graph module that a capture returns: called as the model is, copied and pickled with all that it knows.

torch.fx pickles a graph module as source code and traces that code again: a draw becomes a constant, and what nodes know of the
model is lost. `TracedModule` pickles its nodes.
"""

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from s2a_fx.graph import torch_internals
from s2a_fx.graph.metadata import answer_as_model, find_record
from s2a_fx.graph.model_attributes import can_pickle, switch_mode
from s2a_fx.graph.references import Reference
from s2a_fx.graph.regions import SCOPES

_KEPT_META = ("nn_module_stack", SCOPES)
"""What an unpickled node still knows; its fake value belongs to one process."""


class TracedModule(fx.GraphModule):
    """A `torch.fx.GraphModule` that copies all its attributes, pickles its nodes, and frees its source code when it is freed.

    Attributes of the model that do not pickle are left out of a pickle.
    """

    def recompile(self) -> Any:
        code = super().recompile()
        torch_internals.free_source_with(type(self).forward)
        return code

    def train(self, mode: bool = True) -> "TracedModule":
        record = find_record(self)
        if record is None or record.skeleton is None:
            return super().train(mode)
        switch_mode(self, record.skeleton, mode)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "TracedModule":
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        vars(made).update(copy.deepcopy(_without(vars(self), torch_internals.GRAPH_MODULE_CODE), memo))
        type(made).__name__ = type(self).__name__
        made.graph = copy.deepcopy(self.graph, memo)
        answer_as_model(made)
        torch_internals.call_deepcopy_hooks(made)
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        record = find_record(self)
        kept = () if record is None else record.attributes
        unknown = [name for name in kept if name in vars(self) and not can_pickle(vars(self)[name])]
        state = _without(vars(self), (*torch_internals.GRAPH_MODULE_CODE, *unknown))
        nodes = tuple(_NodeState.of(node) for node in self.graph.nodes)
        tracer, code = torch_internals.tracer_of(self.graph), torch_internals.codegen_of(self.graph)
        return _restore, (type(self).__name__, tracer, code, nodes), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        answer_as_model(self)


def _without(attributes: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if name not in names}


@dataclass(frozen=True)
class _Operand:
    """A node among the arguments of another, by name."""

    name: str

    @staticmethod
    def of(value: Any) -> Any:
        return _Operand(value.name) if isinstance(value, fx.Node) else value


@dataclass(frozen=True)
class _NodeState:
    """A node, its operands by name."""

    op: str
    name: str
    target: Any
    arguments: Any
    meta: dict[str, Any]

    @staticmethod
    def of(node: fx.Node) -> "_NodeState":
        arguments: Any = fx.node.map_aggregate((node.args, node.kwargs), _Operand.of)
        meta = {key: node.meta[key] for key in _KEPT_META if key in node.meta}
        if "nn_module_stack" in meta:
            meta["nn_module_stack"] = [(path, Reference.to(kind)) for path, kind in meta["nn_module_stack"].values()]
        return _NodeState(node.op, node.name, Reference.to(node.target), arguments, meta)

    def add_to(self, graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
        """Create the node in `graph`; `nodes` are those before it, by name."""
        restored: Any = fx.node.map_aggregate(self.arguments, lambda v: nodes[v.name] if isinstance(v, _Operand) else v)
        args, kwargs = restored
        node = graph.create_node(self.op, Reference.follow(self.target), args, kwargs, self.name)
        node.meta = dict(self.meta)
        if "nn_module_stack" in node.meta:
            node.meta["nn_module_stack"] = {path: (path, Reference.follow(kind)) for path, kind in node.meta["nn_module_stack"]}
        nodes[self.name] = node


def _restore(name: str, tracer: Any, codegen: Any, states: tuple[_NodeState, ...]) -> TracedModule:
    """A graph module without its attributes, which unpickling sets afterwards."""
    graph = fx.Graph(tracer_cls=tracer)
    graph.set_codegen(codegen)
    nodes: dict[str, fx.Node] = {}
    for state in states:
        state.add_to(graph, nodes)
    return TracedModule(_Anything(), graph, name)


class _Anything(nn.Module):
    """Has every attribute that a graph refers to, until the real ones are set."""

    def __getattr__(self, name: str) -> Any:
        return _Anything()
