"""Any part of a model, kept as the codes of its inputs and recomputed from them in the backward.

For what no operator of its own serves: the side branch's layers, a trained convolution, the product of two activations. A code's
range holds for 64 neighbours in memory.
"""

from typing import Any

import torch
from torch import fx, nn

from s2a_fx.codecs.rows import Rows
from s2a_fx.nn.recompute import Replay, autocast_state, detached, entered, refuse_second_derivative, state_before, unless_unchanged
from s2a_fx.ops import flat


class CodedInput(nn.Module):
    """`body(*activations, *operands)`, recomputed in the backward from `bits` an element of the activations.

    Args:
        body: from the activations and what else it reads, to the output.
        backward_body: the same, its last layer a `Ghost` where its values are not needed.
        activations: how many of the arguments are coded; the others are parameters and what is made of them.
        bits: of the codes, 1 to 8.
        centered: which of the activations are coded less their mean over the last dimension but one. Keys and values may be: the
            gradients of an attention do not change when a constant is added to all its keys, or to all its values.

    The modules that the bodies call stay registered where they are in the model: this module refers to them, and owns none.
    """

    body: fx.GraphModule
    backward_body: fx.GraphModule

    def __init__(
        self,
        body: fx.GraphModule,
        backward_body: fx.GraphModule,
        activations: int,
        bits: int,
        centered: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.__dict__["body"] = body
        self.__dict__["backward_body"] = backward_body
        self.activations = activations
        self.codec = Rows(bits)
        self.centered = centered

    def forward(self, *arguments: Any) -> torch.Tensor:
        trained = [p for p in self.body.parameters() if p.requires_grad]
        if not torch.is_grad_enabled() or not any(isinstance(t, torch.Tensor) and t.requires_grad for t in (*arguments, *trained)):
            return self.body(*arguments)  # type: ignore[no-any-return]
        return _CodedInput.apply(self, len(arguments), *arguments, *trained)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"activations={self.activations}, bits={self.codec.bits}, centered={self.centered}"


class _CodedInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, module: CodedInput, count: int, *tensors: Any) -> torch.Tensor:
        arguments, trained = tensors[:count], tensors[count:]
        ctx.module, ctx.count, ctx.trained = module, count, trained
        device = arguments[0].device
        ctx.autocast = autocast_state(device.type)
        before = state_before(arguments[0])
        out = module.body(*arguments)
        ctx.random_state = unless_unchanged(before, device)
        codes: list[torch.Tensor] = []
        ctx.layouts = []
        for index, x in enumerate(arguments[: module.activations]):
            coded = torch.sub(x, x.mean(-2, keepdim=True), out=x.new_empty(x.shape)) if index in module.centered else x
            codes += module.codec.encode(flat.rows(coded, 64))
            ctx.layouts.append((x.shape, x.dtype, flat.is_channels_last(coded), x.requires_grad))
        operands = arguments[module.activations :]
        ctx.saved_names = ("codes", "ranges") * module.activations + ("operand",)
        ctx.save_for_backward(*codes, *(t for t in operands if isinstance(t, torch.Tensor)))
        ctx.constants = [None if isinstance(t, torch.Tensor) else t for t in operands]
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        refuse_second_derivative()
        module: CodedInput = ctx.module
        kept = iter(ctx.saved_tensors)
        inputs = [_decoded(module.codec, (next(kept), next(kept)), *layout) for layout in ctx.layouts]
        inputs += [detached(next(kept)) if constant is None else constant for constant in ctx.constants]
        leaves = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
        trained = [p for p in ctx.trained if p.requires_grad]
        with Replay(ctx.random_state, grad.device), torch.enable_grad(), entered(ctx.autocast, grad.device.type):
            result = module.backward_body(*inputs)
        found = iter(torch.autograd.grad(result, (*leaves, *trained), grad, allow_unused=True))
        of_inputs = [next(found) if isinstance(t, torch.Tensor) and t.requires_grad else None for t in inputs]
        return None, None, *of_inputs, *found


def _decoded(
    codec: Rows, coded: tuple[torch.Tensor, torch.Tensor], shape: torch.Size, dtype: torch.dtype, channels_last: bool, grad: bool
) -> torch.Tensor:
    values = flat.restore(codec.decode(coded), shape, channels_last).to(dtype)
    return values.detach().requires_grad_(grad)
