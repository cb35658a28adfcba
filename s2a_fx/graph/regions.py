"""Regions: parts of a graph that run in a context of their own, each one module.

    captured    y = f(x)        under `torch.no_grad()`, `torch.autocast(...)`, or `torch.utils.checkpoint.checkpoint(...)`
    open        node f, with `meta["scopes"]`, which passes read and edit
    closed      node GradMode(x), a module whose body is f: what runs, is copied and is pickled

`trace` returns closed graphs. A pass opens the graph, edits its nodes, and closes it again.
"""

import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from s2a_fx.graph.torch_internals import keep_call

Kind = Literal["grad_mode", "autocast", "checkpoint"]

SCOPES = "scopes"
"""Key in a node's metadata: the tuple of scopes around it, outermost first."""


@dataclass(frozen=True)
class Scope:
    """A context that the model entered.

    Attributes:
        kind: `grad_mode`, `autocast` or `checkpoint`.
        ident: the same for all nodes of one entered context, and for no others.
        options: name and value of each argument: `enabled` for `grad_mode`; those of `torch.autocast`; those of
            `torch.utils.checkpoint.checkpoint`, and `modes`, the modes in which the model checkpoints, if not both.
    """

    kind: Kind
    ident: int
    options: tuple[tuple[str, Any], ...] = ()


def context_of(scope: Scope, device_type: str = "cpu") -> AbstractContextManager[Any]:
    """What a scope of the kind `grad_mode` or `autocast` enters; `device_type` is that of the operands."""
    options = dict(scope.options)
    if scope.kind == "grad_mode":
        return torch.set_grad_enabled(options["enabled"])
    return torch.autocast(**{**options, "device_type": options["device_type"] or device_type})


def scopes_of(node: fx.Node) -> tuple[Scope, ...]:
    """The scopes around a node, outermost first."""
    return tuple(node.meta.get(SCOPES, ()))


def in_one_context(*nodes: fx.Node) -> bool:
    """Whether equal contexts are around all of several nodes, entered once or several times."""
    contexts = [[(scope.kind, scope.options) for scope in scopes_of(node)] for node in nodes]
    return all(found == contexts[0] for found in contexts)


@contextmanager
def in_scopes(node: fx.Node, *kinds: Kind) -> Iterator[None]:
    """Enter the scopes of these kinds around a node of an open graph."""
    with ExitStack() as around:
        for scope in scopes_of(node):
            if scope.kind in kinds:
                around.enter_context(context_of(scope))
        yield


class Region(nn.Module):
    """Base of the modules that stand for a region of the graph.

    Args:
        bodies: the region's graphs by name, `body` among them.

    The modules that the bodies call stay registered where they are in the model, under their one name in the state dict: a region
    refers to them, and owns none.
    """

    body: fx.GraphModule

    def __init__(self, **bodies: fx.GraphModule) -> None:
        super().__init__()
        self.__dict__.update(bodies)
        self.names = tuple(bodies)

    def bodies(self) -> list[fx.GraphModule]:
        """The region's graphs, each once."""
        return list(dict.fromkeys(getattr(self, name) for name in self.names))

    def trained(self) -> list[nn.Parameter]:
        """The parameters that train of the region and of the regions inside it."""
        found = (p for module in modules_within(self) for p in module.parameters(recurse=False) if p.requires_grad)
        return list(dict.fromkeys(found))


def modules_within(module: nn.Module) -> Iterator[nn.Module]:
    """A module and all modules inside it, those that regions run included, each once."""
    seen: set[nn.Module] = set()
    waiting = [module]
    while waiting:
        found = waiting.pop()
        if found not in seen:
            seen.add(found)
            yield found
            inside = [*found.children(), *(found.bodies() if isinstance(found, Region) else ())]
            waiting += reversed(inside)


class ScopeRegion(Region):
    """The nodes of one scope, run in its context.

    Args:
        scope: the context.
        body: the nodes.
        writes: whether the body writes to a buffer or an operand: then the call stays though nobody reads its value.
    """

    def __init__(self, scope: Scope, body: fx.GraphModule, writes: bool) -> None:
        super().__init__(body=body)
        self.scope = scope
        keep_call(self, writes)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.scope.options)


class GradMode(ScopeRegion):
    """A region under `torch.no_grad()` or `torch.enable_grad()`."""

    def forward(self, *operands: Any) -> Any:
        with context_of(self.scope):
            return self.body(*operands)


class Autocast(ScopeRegion):
    """A region under `torch.autocast`; a scope without a device type means that of the operands."""

    def forward(self, *operands: Any) -> Any:
        own = (parameter for module in modules_within(self) for parameter in module.parameters(recurse=False))
        tensors = (value for value in itertools.chain(operands, own) if isinstance(value, torch.Tensor))
        with context_of(self.scope, next((tensor.device.type for tensor in tensors), "cpu")):
            return self.body(*operands)


class Checkpoint(ScopeRegion):
    """A region that the model checkpoints: torch keeps its operands and computes the rest again in the backward."""

    def forward(self, *operands: Any) -> Any:
        options = dict(self.scope.options)
        mode = "train" if self.training else "eval"
        if mode not in options.pop("modes", (mode,)):
            return self.body(*operands)
        return checkpoint(self.body, *operands, **options)


class ModeRegion(Region):
    """A part that the model computes in one way in train mode, in another in eval mode.

    Args:
        body: the nodes of train mode.
        eval_body: those of eval mode, which take the same operands and return as many values.
        writes: as in `ScopeRegion`.
    """

    eval_body: fx.GraphModule

    def __init__(self, body: fx.GraphModule, eval_body: fx.GraphModule, writes: bool) -> None:
        super().__init__(body=body, eval_body=eval_body)
        keep_call(self, writes)

    def forward(self, *operands: Any) -> Any:
        return self.body(*operands) if self.training else self.eval_body(*operands)


class WhenGiven(Region):
    """What is computed where optional arguments are given; where one is None, as many None as that returns.

    Args:
        body: the nodes; its first operands are the arguments.
        arguments, results: how many there are.
        writes: whether the body writes to a buffer or an operand.
    """

    def __init__(self, body: fx.GraphModule, arguments: int, results: int, writes: bool) -> None:
        super().__init__(body=body)
        self.arguments, self.results = arguments, results
        keep_call(self, writes)

    def forward(self, *operands: Any) -> Any:
        if any(argument is None for argument in operands[: self.arguments]):
            return (None,) * self.results
        return self.body(*operands)


REGIONS: dict[Kind, type[ScopeRegion]] = {"grad_mode": GradMode, "autocast": Autocast, "checkpoint": Checkpoint}
"""Kind of a scope -> the module that runs its nodes."""

MODEL_REGIONS = (ScopeRegion, ModeRegion, WhenGiven)
"""Regions that are the model's own; passes make others."""
