"""A user's `torch.autograd.Function` as a module of the graph, which calls it as the model did."""

from typing import Any

import torch
from torch import nn


class ApplyFunction(nn.Module):
    """Calls `function.apply`: what it keeps for its backward, and its backward itself, stay as its author wrote them."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def extra_repr(self) -> str:
        return self.function.__qualname__

    def forward(self, *args: Any) -> Any:
        return self.function.apply(*args)  # type: ignore[no-untyped-call]
