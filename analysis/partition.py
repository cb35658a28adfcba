"""What torch.compile makes of a training step: AOTAutograd's forward and backward graphs, after Inductor's own passes and min-cut.

The model is compiled on fake tensors up to the point where Inductor would generate code, and no further: nothing is compiled to
machine code, nothing is allocated. `activation_memory_budget` and every other setting of the compiler count as they stand.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from s2a_fx.analysis.simulation import run_backward
from s2a_fx.errors import InputError
from s2a_fx.graph import torch_internals
from s2a_fx.graph.fake import fake_copy, fake_tensor, traced_inputs
from s2a_fx.graph.provenance import module_path, plain_path
from s2a_fx.graph.torch_internals import FakeTensorMode, tree_flatten, tree_unflatten


@dataclass(frozen=True)
class Partition:
    """A compiled training step, as two graphs of ATen operators.

    Attributes:
        model: the fake copy of the model that was compiled.
        inputs: the fake inputs it was compiled for.
        arguments: what the forward graph is called with: the model's own parameters and buffers, and the inputs.
        forward: returns what the model returns, then what the backward needs.
        results: which of the forward's outputs the model returns; what it writes into its buffers comes before them.
        saved: which of the forward's outputs go to the backward.
        restore: from these outputs to what the model returns.
        backward: from the saved tensors and the gradients of the outputs to the gradients of `arguments`; None if nothing trains.
    """

    model: nn.Module
    inputs: tuple[Any, ...]
    arguments: tuple[Any, ...]
    forward: fx.GraphModule
    results: slice
    saved: slice
    restore: Callable[[Sequence[Any]], Any]
    backward: fx.GraphModule | None


def partition(
    gm: fx.GraphModule, mode: FakeTensorMode, loss: Callable[[Any], torch.Tensor], batch_size: int | None = None
) -> Partition:
    """Compile `gm` for training by `loss` on fake tensors of `mode`, as `torch.compile(gm, fullgraph=True)` would.

    Raises:
        InputError: the model does not compile as one graph, or returns what a compiled step cannot be told apart by.
    """
    memo: dict[int, Any] = {id(t): fake_tensor(t, mode) for t in [*gm.parameters(), *gm.buffers()]}
    model = fake_copy(gm, memo)
    inputs = tuple(fake_tensor(t, mode, batch_size) for t in traced_inputs(gm))
    recorder = _Recorder()
    with mode, torch_internals.without_autograd_cache():
        try:
            output = torch.compile(model, backend=recorder, fullgraph=True)(*inputs)
        except torch_internals.dynamo_exception() as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"torch.compile does not take this model as one graph: {reason}; use mode='eager'.") from error
        _check_outputs(output, recorder)
        value = loss(output)
        if value.requires_grad:  # the backward is compiled when it is first run
            run_backward(value)
    for parameter in model.parameters():
        parameter.grad = None
    _restore_provenance(recorder.forward)
    return Partition(
        model,
        inputs,
        recorder.arguments,
        recorder.forward,
        recorder.results,
        recorder.saved,
        _restorer(output),
        recorder.backward,
    )


class _Recorder:
    """A backend that writes down the graphs and runs them as they are."""

    forward: fx.GraphModule
    backward: fx.GraphModule | None = None
    arguments: tuple[Any, ...]
    results: slice
    saved: slice

    def __call__(self, gm: fx.GraphModule, example_inputs: Any) -> Any:
        return torch_internals.compile_by_inductor(gm, example_inputs, self._record)

    def _record(self, graph: fx.GraphModule, example_inputs: Any, **options: Any) -> Any:
        if options.get("is_backward"):
            self.backward = graph
            return torch_internals.boxed(graph.forward)
        self.forward = graph
        metadata = torch_internals.forward_metadata()
        first = metadata.num_mutated_inp_runtime_indices
        self.results = slice(first, first + metadata.num_outputs)
        self.saved = slice(0, 0) if options.get("is_inference") else metadata.tensors_saved_for_backwards_slice

        def run(*arguments: Any) -> Any:
            self.arguments = arguments
            return graph.forward(*arguments)

        return torch_internals.boxed(run)


def _check_outputs(output: Any, recorder: _Recorder) -> None:
    leaves = tree_flatten(output)[0]
    distinct = len({id(leaf) for leaf in leaves}) == recorder.results.stop - recorder.results.start == len(leaves)
    alike = len({isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves}) == 1
    views = any(isinstance(leaf, torch.Tensor) and torch_internals.is_view(leaf) for leaf in leaves)
    if not distinct or not alike or views:
        raise InputError(
            f"mode='compile' tells of models that return tensors, each once, none a view of another, all or none with a gradient; "
            f"got {type(output).__name__} of {len(leaves)}. Wrap the model so that it returns what the loss needs, or use 'eager'."
        )


def _restorer(output: Any) -> Callable[[Sequence[Any]], Any]:
    """From a list of tensors to the structure of `output`."""
    structure = tree_flatten(output)[1]
    return lambda tensors: tree_unflatten(tensors, structure)


def _restore_provenance(graph: fx.GraphModule) -> None:
    """Write the modules' paths as the model's own, in the place of the expressions that Dynamo reads them by."""
    for node in graph.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack:
            path = plain_path(module_path(node))
            node.meta["nn_module_stack"] = {path: (path, list(stack.values())[-1][1])}
