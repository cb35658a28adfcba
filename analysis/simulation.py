"""One training step on fake tensors, written down: every storage, who keeps it, and when it lives.

Autograd itself is the oracle. The graph runs node by node; `saved_tensors_hooks` see what each node makes autograd keep, a
dispatch mode sees every allocation, weak references see every release. No table of "what operator X saves" is needed.

`simulate` only records. What the record means is told by `saved.py` (what is kept) and `peak.py` (the timeline).
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from s2a_fx.analysis.device import CPU, DeviceModel
from s2a_fx.analysis.ledger import NODE, Ledger, SaveRecord, StepRecord, in_steady_state, tensors_in
from s2a_fx.analysis.loss import default_loss, describe_loss
from s2a_fx.analysis.optimizer import make_optimizer, stand_ins
from s2a_fx.errors import InputError
from s2a_fx.graph import torch_internals
from s2a_fx.graph.caches import without_caches
from s2a_fx.graph.fake import fake_mode, fake_modules, fake_tensor, traced_inputs
from s2a_fx.graph.regions import Checkpoint, in_scopes
from s2a_fx.graph.torch_internals import neutral_state, operator_of_backward, packed_by_hooks, saved_attributes, shadow_of
from s2a_fx.nn.checkpointed import Checkpointed
from s2a_fx.nn.recompute import at_most_parts
from s2a_fx.ops import SAVED


def simulate(
    gm: fx.GraphModule,
    *,
    device: DeviceModel = CPU,
    loss: Callable[[Any], torch.Tensor] | None = None,
    optimizer: str | Callable[..., torch.optim.Optimizer] | None = "adamw",
    batch_size: int | None = None,
    forward_only: bool = False,
) -> StepRecord:
    """Run a training step of `gm` on fake tensors; nothing is allocated and `gm` is left as it was.

    The step is one of many: optimizer state is there from the start, gradients are none (`zero_grad(set_to_none=True)`).

    Args:
        gm: a traced graph; the example inputs it was traced with give the shapes.
        device: whose kernels and allocator to model.
        loss: from the model's output to a scalar; left out, cross-entropy for (batch, classes), the mean otherwise.
        optimizer: `adamw`, `adam`, `sgd`, a function from parameters to an optimizer, or None for no optimizer.
        batch_size: replaces the first dimension of the example inputs.
        forward_only: stop when the forward ends: enough to know what is kept.
    """
    mode = fake_mode()
    model = fake_modules(gm, mode)
    inputs = tuple(fake_tensor(t, mode, batch_size) for t in traced_inputs(gm))
    ledger = Ledger(device)
    parts = 1 if forward_only else 3  # the first makes what all write to, the second what all add to; then they are alike
    with neutral_state(), without_caches(gm), mode, device.functions(), at_most_parts(parts):
        ledger.own_all(model, inputs)
        stepping = Stepping.of(model, None if forward_only else optimizer, device.foreach)
        with ledger:
            keeper = _Keeper(ledger)
            with torch.autograd.graph.saved_tensors_hooks(keeper.pack, keeper.unpack):
                output = _Runner(model, gm.graph, ledger, keeper).run(*inputs)
                saves = keeper.alive()
                if not forward_only:
                    ledger.enter("loss", "")
                    value = (loss or default_loss)(output)
                    keeper.label([value], "loss")
            if not forward_only:
                described = describe_loss(output) if loss is None else "loss: the given function"
                del output
                if value.requires_grad:
                    ledger.enter("backward", "")
                    run_backward(value)
                del value
                stepping.step(ledger)
    ledger.close()
    assumptions = device.assumptions if forward_only else (*device.assumptions, described)
    return StepRecord(tuple(ledger.storages), saves, in_steady_state(ledger), assumptions)


@dataclass
class Stepping:
    """What trains, and how a step ends.

    Attributes:
        trained: the parameters that may have gradients.
        optimizer: as in `simulate`.
        foreach: as in `make_optimizer`.
        stepped: the optimizer after its step, which keeps its state alive.
    """

    trained: tuple[torch.nn.Parameter, ...]
    optimizer: str | Callable[..., torch.optim.Optimizer] | None
    foreach: bool
    stepped: torch.optim.Optimizer | None = None

    @staticmethod
    def of(model: torch.nn.Module, optimizer: str | Callable[..., torch.optim.Optimizer] | None, foreach: bool) -> "Stepping":
        return Stepping(tuple(p for p in model.parameters() if p.requires_grad), optimizer, foreach)

    def step(self, ledger: Ledger) -> None:
        """Say which storages are gradients, and run the optimizer on them; what the loss does not depend on has none."""
        moved = [p for p in self.trained if p.grad is not None]
        ledger.claim((p.grad for p in moved if p.grad is not None), "gradient")
        stands_for = stand_ins(self.optimizer, moved if isinstance(self.optimizer, str) else self.trained, self.foreach)
        optimizer = make_optimizer(self.optimizer, list(stands_for), self.foreach) if stands_for else None
        if optimizer is None:
            return
        ledger.enter("optimizer", "")
        optimizer.step()
        for parameter, count in stands_for.items():
            ledger.claim_state(optimizer.state[parameter].values(), count)
        self.stepped = optimizer


def run_backward(value: torch.Tensor) -> None:
    """`value.backward()` with the function mode left on: torch's own call suspends it, also for what checkpoints compute again."""
    if value.numel() != 1:
        raise InputError(f"loss: got a tensor of shape {tuple(value.shape)}, wanted a single number; take its mean.")
    torch_internals.run_backward(value)


@dataclass(eq=False)
class _Token:
    """Stands for one tensor that autograd keeps; dies when autograd lets go of it."""

    tensor: torch.Tensor
    storage: int
    node: str
    order: int
    operand: str = field(default="")


class _Keeper:
    """The saved-tensor hooks, and the names of what they saw."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.tokens: weakref.WeakSet[_Token] = weakref.WeakSet()
        self.order = 0
        self.attributes: dict[str, dict[str, str]] = {}
        self.checkpointed = False  # what a checkpointed part keeps is its inputs

    def pack(self, tensor: torch.Tensor) -> _Token:
        storage = self.ledger.index_of(tensor)
        record = self.ledger.storages[storage]
        if record.kind == "temporary":
            record.kind = "saved"
        self.order += 1
        if tensor.grad_fn is not None:  # a node's own output would keep its node, and the node the token: never freed
            tensor = shadow_of(tensor)
        token = _Token(tensor, storage, self.ledger.place.node, self.order, "Checkpointed.input" if self.checkpointed else "")
        self.tokens.add(token)
        return token

    def unpack(self, token: _Token) -> torch.Tensor:
        return token.tensor

    def label(self, values: Iterable[torch.Tensor], node: str) -> None:
        """Mark the autograd nodes that a graph node made, and name what they keep by reading the attributes that hold it."""
        stack: list[Any] = [v.grad_fn for v in values if v.grad_fn is not None]
        while stack:
            function = stack.pop()
            if function is None or NODE in function.metadata:
                continue
            function.metadata[NODE] = node
            for attribute, saved in self._saved_attributes(function).items():
                tokens = [token for token in packed_by_hooks(function, attribute) if isinstance(token, _Token)]
                names = _operand_names(function, saved)
                for index, token in enumerate(tokens):
                    token.operand = token.operand or names[min(index, len(names) - 1)]
            stack += [f for f, _ in function.next_functions if f is not None and type(f).__name__ != "AccumulateGrad"]

    def _saved_attributes(self, function: Any) -> dict[str, str]:
        name = type(function).__name__
        if name not in self.attributes:
            self.attributes[name] = saved_attributes(function)
        return self.attributes[name]

    def alive(self) -> tuple[SaveRecord, ...]:
        tokens = sorted(self.tokens, key=lambda t: t.order)
        return tuple(
            SaveRecord(t.storage, t.node, t.operand or "saved", tuple(t.tensor.shape), t.tensor.dtype, t.order) for t in tokens
        )


def _operand_names(node: Any, saved: str) -> list[str]:
    """What to call the tensors that an autograd node keeps as `saved`: `GeluBackward0.self`, or by an operator's own words."""
    function = type(node).__name__
    saved_names = getattr(node, "saved_names", None)
    if saved_names and saved == "saved_tensors":
        return [f"{function.strip('_').removesuffix('Backward')}.{name}" for name in saved_names]
    operator = operator_of_backward(function)
    if operator and saved == "saved_tensors":
        return [f"{operator}.{name}" for name in SAVED[operator]]
    return [f"{function}.{saved}"]


class _Runner(fx.Interpreter):
    """Runs the graph, telling ledger and keeper which node is at work."""

    def __init__(self, model: torch.nn.Module, graph: fx.Graph, ledger: Ledger, keeper: _Keeper) -> None:
        super().__init__(model, graph=graph)
        self.extra_traceback = False
        self.ledger = ledger
        self.keeper = keeper

    def run_node(self, n: fx.Node) -> Any:
        self.ledger.enter("forward", n.name)
        for operand in n.all_input_nodes:
            for tensor in tensors_in(self.env[operand]):
                self.ledger.storages[self.ledger.index_of(tensor)].last_read = n.name
        self.keeper.checkpointed = n.op == "call_module" and isinstance(
            self.module.get_submodule(str(n.target)), Checkpointed | Checkpoint
        )
        with in_scopes(n, "grad_mode", "autocast"):
            result = super().run_node(n)
        self.keeper.label(tensors_in(result), n.name)
        return result
