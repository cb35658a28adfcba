"""Two frozen linear layers around an activation, a few images at a time, that keep the bins of the activation's derivative.

Neither forward nor backward ever holds the wide tensor between the layers as a whole: at a ViT-B's last block it and its gradient
are what the step peaks at. A part that stays in the cache is also quicker than the whole.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from s2a_fx.codecs.bins import best_bins, encode_bins, scale_by_bins
from s2a_fx.codecs.packing import packed_width
from s2a_fx.nn.recompute import parts, refuse_second_derivative
from s2a_fx.ops.activation import BINNED

_PART_BYTES = 24 * 10**6
"""What the wide tensor of a part may take: smaller parts cost time, larger ones stand in the peak."""


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
        biases = [b for b in (bias_1, bias_2) if b is not None]
        frozen = not weight_1.requires_grad and not weight_2.requires_grad
        if frozen and torch.is_grad_enabled() and any(t.requires_grad for t in (x, *biases)):
            return _CodedMLP.apply(x, weight_1, bias_1, weight_2, bias_2, self.name, self.bits)  # type: ignore[no-any-return]
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
        rows = x.shape[:-1].numel() // x.shape[0] if x.shape[0] else 0
        codes = torch.empty(x.shape[0] * rows, packed_width(wide, bits), dtype=torch.uint8, device=x.device)
        out = None
        for start, part in parts(x, _images(x, wide)):
            u = F.linear(part, weight_1, bias_1)
            codes[start * rows : (start + part.shape[0]) * rows] = encode_bins(u.reshape(-1, wide), list(ctx.bins.boundaries), bits)
            u = BINNED[name](u)
            result = F.linear(u, weight_2, bias_2)
            del u
            if part.shape[0] == x.shape[0]:
                out = result
            else:
                out = result.new_empty(*x.shape[:-1], weight_2.shape[0]) if out is None else out
                out[start : start + part.shape[0]] = result
            del result
        assert out is not None
        ctx.saved_names = ("codes", "weight", "weight")
        ctx.save_for_backward(codes, weight_1, weight_2)
        ctx.dtypes = [None if b is None else b.dtype for b in (bias_1, bias_2)]
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        refuse_second_derivative()
        codes, weight_1, weight_2 = ctx.saved_tensors
        of_x, of_1, of_2 = (ctx.needs_input_grad[i] for i in (0, 2, 4))
        rows = grad.shape[:-1].numel() // grad.shape[0] if grad.shape[0] else 0
        grad_x = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device) if of_x else None
        total = torch.promote_types(grad.dtype, torch.float32)
        grad_1 = torch.zeros(weight_1.shape[0], dtype=total, device=grad.device) if of_1 else None
        weight_1, weight_2 = weight_1.to(grad.dtype), weight_2.to(grad.dtype)
        for start, part in parts(grad, _images(grad, weight_1.shape[0])):
            if grad_x is None and grad_1 is None:
                break
            g = torch.mm(part.reshape(-1, part.shape[-1]), weight_2)
            place = slice(start * rows, (start + part.shape[0]) * rows)
            g = scale_by_bins(g, codes[place], list(ctx.bins.levels), ctx.bits)
            if grad_1 is not None:
                grad_1 += g.sum(0, dtype=total)
            if grad_x is not None:
                torch.mm(g, weight_1, out=grad_x.view(-1, ctx.shape[-1])[place])
            del g
        grad_2 = grad.flatten(0, -2).sum(0) if of_2 else None
        biases = [None if g is None else g.to(dtype) for g, dtype in zip((grad_1, grad_2), ctx.dtypes, strict=True)]
        return None if grad_x is None else grad_x.to(ctx.dtype), None, biases[0], None, biases[1], None, None


def _images(x: torch.Tensor, wide: int) -> int:
    """How many of the first dimension are a part."""
    of_one = x[:1].numel() // x.shape[-1] * wide * x.element_size()
    return max(1, _PART_BYTES // of_one) if of_one else 0
