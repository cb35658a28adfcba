"""Attention that keeps the codes of its map, and of q, k and v: the backward multiplies matrices and recomputes nothing."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from s2a_fx.codecs.powers import Powers
from s2a_fx.codecs.rows import Rows
from s2a_fx.nn.coded_input import GROUP, of_images
from s2a_fx.nn.recompute import needs_grad, parts, refuse_second_derivative
from s2a_fx.ops import flat


class CodedAttention(nn.Module):
    """`scaled_dot_product_attention` without dropout, its map kept at `bits` an element of its cube root, q, k and v in rows.

    Keys and values are coded less their mean over the tokens: where the rows of the map add up to 1, the gradients do not change.

    Takes query (B, heads, N, D), key and value (B, heads, K, D), and an additive or boolean mask that broadcasts to
    (B, heads, N, K) and needs no gradient.

    Args:
        scale: of the product of query and key; None for 1 / sqrt(D).
        is_causal: no token attends to later ones.
        bits: of map, q, k and v, 1 to 8.
        images: how many of the first dimension are worked on at a time where the map is made or read; 0 for all.
    """

    def __init__(self, scale: float | None, is_causal: bool, bits: int = 4, images: int = 0) -> None:
        super().__init__()
        self.scale, self.is_causal, self.bits = scale, is_causal, bits
        self.codec, self.map_codec = Rows(bits), Powers(bits)
        self.images = images

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        if needs_grad(query, key, value) and not torch.compiler.is_dynamo_compiling():  # compiled, it keeps what autograd keeps
            return _CodedAttention.apply(self, query, key, value, mask)  # type: ignore[no-any-return]
        return self.inference_form(query, key, value, mask)

    def inference_form(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value, mask, 0.0, self.is_causal, scale=self.scale)

    def extra_repr(self) -> str:
        return f"scale={self.scale}, is_causal={self.is_causal}, bits={self.bits}, images={self.images}"


class _CodedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, module: CodedAttention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.module = module
        ctx.shapes = [t.shape for t in (query, key, value)]
        ctx.dtype = query.dtype
        codes: list[torch.Tensor] = []
        for x in (query, *(t - t.mean(-2, keepdim=True) for t in (key, value))):
            codes += module.codec.encode(flat.groups(x, GROUP))
        of_map: list[torch.Tensor] = []
        rows = query.shape[1:-1].numel()
        for start, part in parts(query, module.images):
            scores = _scores(module, part, key[start : start + part.shape[0]], _of_part(mask, start, part.shape[0], query.shape[0]))
            coded = module.map_codec.encode(scores.softmax(-1).nan_to_num(0).reshape(-1, key.shape[-2]))
            del scores
            of_map = of_map or [t.new_empty(query.shape[0] * rows, t.shape[1]) for t in coded]
            for whole, piece in zip(of_map, coded, strict=True):
                whole[start * rows : start * rows + piece.shape[0]] = piece
            del coded
        codes += of_map
        ctx.saved_names = ("codes", "ranges") * 4
        ctx.save_for_backward(*codes)
        return F.scaled_dot_product_attention(query, key, value, mask, 0.0, module.is_causal, scale=module.scale)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        refuse_second_derivative()
        module: CodedAttention = ctx.module
        saved = ctx.saved_tensors
        batch, tokens = ctx.shapes[0][0], ctx.shapes[1][-2]
        scale = ctx.shapes[0][-1] ** -0.5 if module.scale is None else module.scale
        gradients = [torch.empty(shape, dtype=ctx.dtype, device=grad.device) for shape in ctx.shapes]
        for start, part in parts(grad, module.images):
            place = slice(start, start + part.shape[0])
            here = (start, part.shape[0])
            query, key, value = (
                flat.restore_groups(
                    module.codec.decode(of_images(saved[i : i + 2], here, batch)), torch.Size((part.shape[0], *shape[1:])), False
                )
                for i, shape in zip((0, 2, 4), ctx.shapes, strict=True)
            )
            y = module.map_codec.decode(of_images(saved[6:], here, batch), tokens).view(*query.shape[:-1], tokens)
            y /= y.sum(-1, keepdim=True).clamp_min(1e-12)  # they add up to 1: a constant in the values then does not count
            part = part.float()
            gradients[2][place] = y.mT @ part
            g = part @ value.mT
            g -= (g * y).sum(-1, keepdim=True)
            g *= y
            g *= scale
            gradients[0][place] = g @ key
            gradients[1][place] = g.mT @ query
        needed = ctx.needs_input_grad[1:4]
        return None, *(g if need else None for g, need in zip(gradients, needed, strict=True)), None


def _scores(module: CodedAttention, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """q k^T scale + mask, float32."""
    scale = query.shape[-1] ** -0.5 if module.scale is None else module.scale
    scores = (query.float() * scale) @ key.float().mT
    if module.is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask


def _of_part(mask: torch.Tensor | None, start: int, count: int, batch: int) -> torch.Tensor | None:
    of_each_image = mask is not None and mask.ndim == 4 and mask.shape[0] == batch
    return mask[start : start + count] if mask is not None and of_each_image else mask
