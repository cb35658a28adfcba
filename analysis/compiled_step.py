"""One training step as torch.compile runs it, simulated on fake tensors and written down like an eager one.

The graphs are run operator by operator, each tensor freed after its last reader. Inductor fuses operators, so that most temporaries
are never written: what is saved is exact, the peak is an upper bound.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from s2a_fx.analysis.device import CPU, DeviceModel
from s2a_fx.analysis.ledger import Ledger, SaveRecord, StepRecord, in_steady_state, tensors_in
from s2a_fx.analysis.loss import default_loss, describe_loss
from s2a_fx.analysis.partition import Partition, partition
from s2a_fx.analysis.saved import operator_name
from s2a_fx.analysis.simulation import Stepping, run_backward
from s2a_fx.graph.fake import fake_mode

ASSUMPTIONS = (
    "torch.compile: what AOTAutograd's partitioner saves, after Inductor's passes, with the compiler's settings as they stand",
    "torch.compile: the peak is an upper bound: operators count one by one, and Inductor fuses them",
    "torch.compile: copies of convolution weights that Inductor makes for the CPU are not counted; channels_last weights need none",
)


def simulate_compiled(
    gm: fx.GraphModule,
    *,
    device: DeviceModel = CPU,
    loss: Callable[[Any], torch.Tensor] | None = None,
    optimizer: str | Callable[..., torch.optim.Optimizer] | None = "adamw",
    batch_size: int | None = None,
) -> tuple[fx.GraphModule, StepRecord]:
    """Run a compiled training step of `gm` on fake tensors; the arguments are those of `simulate`.

    Returns:
        The forward graph, whose nodes the record names, and the record.
    """
    mode = fake_mode()
    with device.functions():
        plan = partition(gm, mode, loss or default_loss, batch_size)
    ledger = Ledger(device)
    with mode:
        ledger.own_all(plan.model, plan.inputs)
        stepping = Stepping.of(plan.model, optimizer, device.foreach)
        with ledger:
            outputs = _Runner(plan.forward, ledger, "forward").results(list(plan.arguments))
            leaves = [o.detach().requires_grad_(o.is_floating_point()) for o in outputs[plan.results]]
            kept = outputs[plan.saved]
            del outputs
            saves = _saves(plan, kept, ledger)
            ledger.enter("loss", "")
            output = plan.restore(leaves)
            described = describe_loss(output) if loss is None else "loss: the given function"
            value = (loss or default_loss)(output)
            del output
            ledger.enter("backward", "")
            run_backward(value)
            del value
            if plan.backward is not None:
                arguments = [*kept, *_tangents(plan.backward, len(kept), leaves)]
                del kept, leaves
                gradients = _Runner(plan.backward, ledger, "backward", _origins(plan)).results(arguments)
                _hand_out(plan, gradients)
                del gradients
            stepping.step(ledger)
    ledger.close()
    record = StepRecord(tuple(ledger.storages), saves, in_steady_state(ledger), (*device.assumptions, *ASSUMPTIONS, described))
    return plan.forward, record


class _Runner(fx.Interpreter):
    """Runs a graph without autograd, telling the ledger which node is at work, and frees each argument after its last reader."""

    def __init__(self, gm: fx.GraphModule, ledger: Ledger, phase: str, origins: dict[str, str] | None = None) -> None:
        super().__init__(gm)
        self.extra_traceback = False
        self.ledger = ledger
        self.phase = phase
        self.origins = origins

    def results(self, arguments: list[Any]) -> list[Any]:
        with torch.no_grad():
            return list(self.boxed_run(arguments))

    def run_node(self, n: fx.Node) -> Any:
        self.ledger.enter(self.phase, n.name if self.origins is None else self.origins.get(n.name, ""))
        if self.phase == "forward":
            for operand in n.all_input_nodes:
                for tensor in tensors_in(self.env[operand]):
                    self.ledger.storages[self.ledger.index_of(tensor)].last_read = n.name
        return super().run_node(n)


def _saves(plan: Partition, kept: list[Any], ledger: Ledger) -> tuple[SaveRecord, ...]:
    """A record for each tensor that goes to the backward: held by the node that made it, for the first operator that reads it."""
    outputs: Any = plan.forward.graph.output_node().args[0][plan.saved]  # type: ignore[index]
    if plan.backward is None:
        return ()
    readers = [_first_reader(plan.backward, p) for p in plan.backward.graph.find_nodes(op="placeholder")]
    records = []
    for order, (node, tensor, reader) in enumerate(zip(outputs, kept, readers, strict=False)):
        if isinstance(tensor, torch.Tensor):
            index = ledger.index_of(tensor)
            if ledger.storages[index].kind == "temporary":
                ledger.storages[index].kind = "saved"
            maker = _maker(node)
            records.append(SaveRecord(index, maker.name, reader, tuple(tensor.shape), tensor.dtype, order))
    return tuple(records)


def _maker(node: fx.Node) -> fx.Node:
    """The operator that made a tensor: a tuple's element is its maker's."""
    while node.target is operator.getitem:
        node = node.all_input_nodes[0]
    return node


def _first_reader(backward: fx.GraphModule, placeholder: fx.Node) -> str:
    users = list(placeholder.users)
    return f"backward.{operator_name(backward, users[0])}" if users else "backward"


def _origins(plan: Partition) -> dict[str, str]:
    """Backward node -> the forward node whose gradient it belongs to, by autograd's sequence numbers."""
    assert plan.backward is not None
    first: dict[int, str] = {}
    for node in plan.forward.graph.nodes:
        first.setdefault(node.meta.get("seq_nr", -1), node.name)
    first.pop(-1, None)
    return {node.name: first.get(node.meta.get("seq_nr", -1), "") for node in plan.backward.graph.nodes}


def _tangents(backward: fx.GraphModule, kept: int, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """The gradients of the outputs that the backward graph takes after what was kept."""
    taken = len(backward.graph.find_nodes(op="placeholder")) - kept
    return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves][:taken]


def _hand_out(plan: Partition, gradients: list[Any]) -> None:
    """Give each parameter its gradient."""
    owners = {p.untyped_storage()._cdata: p for p in plan.model.parameters() if p.requires_grad}
    for argument, gradient in zip(plan.arguments, gradients, strict=False):
        owner = owners.get(argument.untyped_storage()._cdata) if isinstance(argument, torch.Tensor) else None
        if owner is not None and isinstance(gradient, torch.Tensor):
            owner.grad = gradient
