"""Two frozen linear layers around an activation, some rows at a time, that keep the bins of the activation's derivative.

Where it is trained, neither forward nor backward holds the wide tensor between the layers as a whole: at a ViT-B's last block it
and its gradient are what the step peaks at. A part that stays in the cache is also quicker than the whole.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from s2a_fx.codecs.bins import best_bins, encode_bins, scale_by_bins
from s2a_fx.codecs.packing import packed_width
from s2a_fx.nn.recompute import needs_grad, of_each_part, parts, refuse_second_derivative
from s2a_fx.ops.activation import BINNED, binned


class CodedMLP(nn.Module):
    """`linear(activation(linear(x, weight_1, bias_1)), weight_2, bias_2)` that keeps `bits` an element of the wide tensor.

    Takes x (..., channels), weights (wide, channels) and (out, wide), biases of (wide,) and (out,) or None. Gradients are for x and
    the biases; with a weight that trains it is the plain function, which keeps what that needs.
    """

    def __init__(self, name: str, bits: int = 4) -> None:
        super().__init__()
        self.name, self.bits = name, bits

    def forward(
        self,
        x: torch.Tensor,
        weight_1: torch.Tensor,
        bias_1: torch.Tensor | None,
        weight_2: torch.Tensor,
        bias_2: torch.Tensor | None,
    ) -> torch.Tensor:
        frozen = not weight_1.requires_grad and not weight_2.requires_grad
        if frozen and needs_grad(x, bias_1) and torch.compiler.is_dynamo_compiling():
            u = F.linear(x, weight_1, bias_1)
            return F.linear(binned(u, self.name, self.bits)[0], weight_2, bias_2)
        if frozen and needs_grad(x, bias_1):
            return _CodedMLP.apply(x, weight_1, bias_1, weight_2, bias_2, self.name, self.bits)  # type: ignore[no-any-return]
        return self.inference_form(x, weight_1, bias_1, weight_2, bias_2)

    def inference_form(
        self,
        x: torch.Tensor,
        weight_1: torch.Tensor,
        bias_1: torch.Tensor | None,
        weight_2: torch.Tensor,
        bias_2: torch.Tensor | None,
    ) -> torch.Tensor:
        return F.linear(BINNED[self.name](F.linear(x, weight_1, bias_1)), weight_2, bias_2)

    def extra_repr(self) -> str:
        return f"{self.name}, bits={self.bits}"


class _CodedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight_1: torch.Tensor,
        bias_1: torch.Tensor | None,
        weight_2: torch.Tensor,
        bias_2: torch.Tensor | None,
        name: str,
        bits: int,
    ) -> torch.Tensor:
        ctx.bins, ctx.bits = best_bins(BINNED[name], bits), bits
        wide = weight_1.shape[0]
        x_rows = x.reshape(-1, x.shape[-1])
        codes = torch.empty(x_rows.shape[0], packed_width(wide, bits), dtype=torch.uint8, device=x.device)
        out = None
        for start, part in parts(x_rows, of_each_part(wide * x.element_size())):
            u = F.linear(part, weight_1, bias_1)
            codes[start : start + part.shape[0]] = encode_bins(u, list(ctx.bins.boundaries), bits)
            u = BINNED[name](u)
            result = F.linear(u, weight_2, bias_2)
            del u
            if part.shape[0] == x_rows.shape[0]:
                out = result
            else:
                out = result.new_empty(x_rows.shape[0], weight_2.shape[0]) if out is None else out
                out[start : start + part.shape[0]] = result
            del result
        assert out is not None
        ctx.saved_names = ("codes", "weight", "weight")
        ctx.save_for_backward(codes, weight_1, weight_2)
        ctx.dtypes = [None if b is None else b.dtype for b in (bias_1, bias_2)]
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return out.view(*x.shape[:-1], weight_2.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        refuse_second_derivative()
        with torch.autocast(grad.device.type, enabled=False):  # it is in the dtypes that the forward was in
            of_x, of_1, of_2 = _gradients(ctx, grad.reshape(-1, grad.shape[-1]))
        biases = [None if g is None else g.to(dtype) for g, dtype in zip((of_1, of_2), ctx.dtypes, strict=True)]
        return None if of_x is None else of_x.view(ctx.shape).to(ctx.dtype), None, biases[0], None, biases[1], None, None


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Of x, (rows, channels), and of both biases; None where none is asked for."""
    codes, *weights = ctx.saved_tensors
    weight_1, weight_2 = (w.to(grad.dtype) for w in weights)
    asked = [ctx.needs_input_grad[i] for i in (0, 2, 4)]
    precision = torch.promote_types(grad.dtype, torch.float32)
    of_x = grad.new_empty(grad.shape[0], weight_1.shape[1]) if asked[0] else None
    of_1 = grad.new_zeros(weight_1.shape[0], dtype=precision) if asked[1] else None
    for start, part in parts(grad, of_each_part(weight_1.shape[0] * grad.element_size())):
        place = slice(start, start + part.shape[0])
        g = scale_by_bins(torch.mm(part, weight_2), codes[place], list(ctx.bins.levels), ctx.bits)
        if of_1 is not None:
            of_1 += g.sum(0, dtype=precision)
        if of_x is not None:
            torch.mm(g, weight_1, out=of_x[place])
        del g
    return of_x, of_1, grad.sum(0) if asked[2] else None
