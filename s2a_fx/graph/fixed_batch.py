"""Graphs that are right for one batch size alone: of a model that counts its images, by a loop over them say."""

import torch
from torch import fx, nn

from s2a_fx.errors import ShapeError
from s2a_fx.graph.edit import free_path
from s2a_fx.graph.torch_internals import keep_call


class FixedBatch(nn.Module):
    """Raises `ShapeError` where the first dimension of its input is another than `size`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        keep_call(self)

    def forward(self, x: torch.Tensor) -> None:
        if x.shape[0] != self.size:
            raise ShapeError(
                f"got a batch of {x.shape[0]}, and this graph is for batches of {self.size}: the model counts its images, by a "
                "loop say, and the count is part of the graph. Trace the model with such a batch, or drop the last one."
            )

    def extra_repr(self) -> str:
        return f"size={self.size}"


def fix_batch(gm: fx.GraphModule, size: int) -> None:
    """Let a graph take batches of one size alone."""
    inputs = gm.graph.find_nodes(op="placeholder")
    path = free_path(gm, "", "fixed_batch")
    gm.add_submodule(path, FixedBatch(size).train(gm.training))
    with gm.graph.inserting_after(inputs[-1]):
        call = gm.graph.call_module(path, (inputs[0],))
    call.meta = {"nn_module_stack": {}, "val": None}
    gm.recompile()
