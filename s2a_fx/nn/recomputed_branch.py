"""A residual branch that keeps its normalized input in a few bits, and nothing else.

    before  x -> norm -> linear -> ... -> linear     keeps x, the normalized x, q, k, v, the wide activations, ...
    after   RecomputedBranch(x)                      keeps codes of x_hat and 1 / sigma; recomputes the rest in the backward

The forward is exact. The backward decodes x_hat and runs the branch again up to its last linear layer, whose output no gradient
needs. Both run over a few images at a time, so that the branch's wide tensors never stand in memory whole.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from s2a_fx.codecs.rows import Rows
from s2a_fx.nn.compiled import DecodedNorm, recomputed
from s2a_fx.nn.recompute import (
    Recomputed,
    ReplayState,
    as_leaf,
    needs_grad,
    parts,
    refuse_second_derivative,
    with_tensors,
    without_tensors,
)
from s2a_fx.ops.normalize import (
    by_image,
    channel_shift,
    normalize_backward,
    normalize_decode,
    normalize_encode,
    normalized,
    plain_norm,
)


@dataclass(frozen=True)
class Norm:
    """The normalization that a branch begins with: `centered` for layer norm, not for RMS norm; over the last dimension."""

    eps: float
    centered: bool = True

    def __call__(
        self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The normalized x, and mean and 1 / sigma of each row, (images, rows, 1)."""
        return normalized(x, weight, bias, self.eps, self.centered)


class RecomputedBranch(Recomputed):
    """`body(norm(x), *operands)`, recomputed in the backward from `bits` an element of the normalized input.

    Args:
        norm: the normalization.
        body, backward_body: from the normalized input and the operands to the branch's output; see `Recomputed`.
        bits: of the codes, 1 to 8.
        group: how many neighbours in a row share a range; divides the width.
        images: how many images run at a time; 0 for all at once.
    """

    def __init__(self, norm: Norm, body: fx.GraphModule, backward_body: fx.GraphModule, bits: int, group: int, images: int) -> None:
        super().__init__(body, backward_body)
        self.norm = norm
        self.codec = Rows(bits)
        self.group, self.images = group, images

    def forward(self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, *operands: Any) -> torch.Tensor:
        trained = self.trained()
        if not needs_grad(x, weight, bias, *operands, *trained):
            return self.body(*self.of_body(x, weight, bias, *operands))  # type: ignore[no-any-return]
        if torch.compiler.is_dynamo_compiling():
            return self.body(self.norm(x, weight, bias)[0], *operands) if self.draws else self._compiled(x, weight, bias, *operands)
        return _RecomputedBranch.apply(self, len(operands), x, weight, bias, *operands, *trained)  # type: ignore[no-any-return]

    def of_body(self, *arguments: Any) -> tuple[Any, ...]:
        x, weight, bias, *operands = arguments
        return plain_norm(x, weight, bias, self.norm.eps, self.norm.centered), *operands

    def _compiled(self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, *operands: Any) -> torch.Tensor:
        """`forward` for a compiler (see `nn/compiled.py`)."""
        width = x.shape[-1]
        with torch.no_grad():
            y, mean, rstd = self.norm(x, weight, bias)
            codes = self.encoded(x, mean, rstd)
        scale = torch.ones(1, width, device=x.device) if weight is None else weight.view(1, width)
        added = torch.zeros(1, width, device=x.device) if bias is None else bias.view(1, width)

        def part(x: torch.Tensor, scale: torch.Tensor, added: torch.Tensor, *tensors: Any) -> torch.Tensor:
            options = (self.codec.bits, self.norm.centered, y.dtype)
            decoded = DecodedNorm.apply(by_image(x), scale, added, *tensors[:4], *options)
            return self.backward_body(decoded.view(x.shape), *tensors[4:])  # type: ignore[no-any-return]

        return recomputed(lambda: self.body(y, *operands), part, x, scale, added, *codes, *operands)

    def encoded(self, x: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What is kept of x: codes, ranges, 1 / sigma and shift, each (images, rows or 1, ...)."""
        rows = by_image(x)
        shift = channel_shift(rows, mean, rstd)
        return *normalize_encode(rows, mean, rstd, shift, self.codec.bits, self.group), rstd.bfloat16(), shift

    def run_at_once(self) -> None:
        self.images = 0

    def extra_repr(self) -> str:
        return f"{self.norm}, bits={self.codec.bits}, group={self.group}, images={self.images}"


class _RecomputedBranch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, branch: RecomputedBranch, count: int, x: torch.Tensor, *tensors: Any) -> torch.Tensor:
        weight, bias, *operands = tensors[: 2 + count]
        ctx.branch, ctx.shape, ctx.dtype = branch, x.shape, x.dtype
        ctx.trained = tensors[2 + count :]
        ctx.state = ReplayState(branch.body, x)
        out, codes = None, None
        for start, part in parts(x, branch.images):
            y, mean, rstd = branch.norm(part, weight, bias)
            coded = branch.encoded(part, mean, rstd)
            del mean, rstd
            ctx.normalized_dtype = y.dtype
            result = branch.body(y, *operands)
            del y
            if part.shape[0] == x.shape[0]:
                out, codes = result, coded
                break
            if out is None or codes is None:
                out = result.new_empty(x.shape[0], *result.shape[1:])
                codes = tuple(t.new_empty(x.shape[0], *t.shape[1:]) for t in coded)
            for whole, piece in zip((out, *codes), (result, *coded), strict=True):
                whole[start : start + part.shape[0]] = piece
            del result, coded, piece
        ctx.state.end_forward()
        assert out is not None and codes is not None
        present = [name for name, t in (("weight", weight), ("bias", bias)) if t is not None]
        ctx.saved_names = ("codes", "ranges", "rstd", "shift", *present, "operand")
        ctx.save_for_backward(*codes, weight, bias, *(t for t in operands if isinstance(t, torch.Tensor)))
        ctx.constants = without_tensors(operands)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        refuse_second_derivative()
        branch: RecomputedBranch = ctx.branch
        saved = ctx.saved_tensors
        codes, (weight, bias), kept = saved[:4], saved[4:6], saved[6:]
        operands = list(map(as_leaf, with_tensors(ctx.constants, iter(kept)), ctx.needs_input_grad[5:]))
        leaves = [t for t in operands if isinstance(t, torch.Tensor) and t.requires_grad] + list(ctx.trained)
        totals: list[torch.Tensor | None] = [None] * len(leaves)
        width, bits = ctx.shape[-1], branch.codec.bits
        one, zero = torch.ones(1, width, device=grad.device), torch.zeros(1, width, device=grad.device)
        scale = one if weight is None else weight.detach().view(1, width)
        added = zero if bias is None else bias.detach().view(1, width)
        grad_x = torch.empty(ctx.shape, dtype=ctx.dtype, device=grad.device) if ctx.needs_input_grad[2] else None
        norm_totals: list[torch.Tensor | None] = [None, None]
        with ctx.state.replay():
            for start, part in parts(grad, branch.images):
                packed, ranges, rstd, shift = (t[start : start + part.shape[0]] for t in codes)
                y = normalize_decode(packed, ranges, shift, scale, added, bits, ctx.normalized_dtype)
                y = y.view(part.shape[0], *ctx.shape[1:]).requires_grad_()
                with torch.enable_grad(), ctx.state.autocast():
                    result = branch.backward_body(y, *operands)
                grad_y, *grads = torch.autograd.grad(result, (y, *leaves), part, allow_unused=True)
                del result
                totals = [_sum(total, g) for total, g in zip(totals, grads, strict=True)]
                grad_y = by_image(grad_y)
                if ctx.needs_input_grad[3]:
                    unit = normalize_decode(packed, ranges, shift, one, zero, bits, torch.float32)
                    norm_totals[0] = _sum(norm_totals[0], (grad_y.float() * unit).sum((0, 1)).to(weight.dtype))
                if ctx.needs_input_grad[4]:
                    norm_totals[1] = _sum(norm_totals[1], grad_y.sum((0, 1)).to(bias.dtype))
                del y
                if grad_x is not None:
                    grad_x[start : start + part.shape[0]] = normalize_backward(
                        grad_y, packed, ranges, shift, rstd, scale, bits, branch.norm.centered, ctx.dtype
                    ).view(part.shape[0], *ctx.shape[1:])
        found = iter(totals)
        of_operands = [next(found) if isinstance(t, torch.Tensor) and t.requires_grad else None for t in operands]
        return None, None, grad_x, *norm_totals, *of_operands, *found


def _sum(total: torch.Tensor | None, term: torch.Tensor | None) -> torch.Tensor | None:
    if total is None or term is None:
        return term if total is None else total
    return total + term
