"""Any part of a model, kept as the codes of its inputs and recomputed from them in the backward.

For what no operator of its own serves: the side branch's layers, a trained convolution, the product of two activations. A code's
range holds for 64 neighbours in memory.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from s2a_fx.codecs.rows import Coded, Rows
from s2a_fx.nn.recompute import Circumstances, Recomputed, detached, needs_grad, parts, refuse_second_derivative
from s2a_fx.ops import flat

GROUP = 64
"""Neighbours that share a range."""


class CodedInput(Recomputed):
    """`body(*activations, *operands)`, recomputed in the backward from `bits` an element of the activations.

    Args:
        body, backward_body: from the activations and what else it reads, to the output; see `Recomputed`.
        activations: how many of the arguments are coded; the others are parameters and what is made of them.
        bits: of the codes, 1 to 8.
        centered: which of the activations are coded less their mean over the last dimension but one. Keys and values may be: the
            gradients of an attention do not change when a constant is added to all its keys, or to all its values.
        images: how many of the first dimension the backward recomputes at a time; 0 for all. Each must be a function of its own.
    """

    def __init__(
        self,
        body: fx.GraphModule,
        backward_body: fx.GraphModule,
        activations: int,
        bits: int,
        centered: tuple[int, ...] = (),
        images: int = 0,
    ) -> None:
        super().__init__(body, backward_body)
        self.activations = activations
        self.codec = Rows(bits)
        self.centered = centered
        self.images = images

    def forward(self, *arguments: Any) -> torch.Tensor:
        trained = self.trained()
        if not needs_grad(*arguments, *trained):
            return self.body(*arguments)  # type: ignore[no-any-return]
        return _CodedInput.apply(self, len(arguments), *arguments, *trained)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"activations={self.activations}, bits={self.codec.bits}, centered={self.centered}, images={self.images}"


class _Layout(NamedTuple):
    shape: torch.Size
    dtype: torch.dtype
    channels_last: bool
    needs_grad: bool


class _CodedInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, module: CodedInput, count: int, *tensors: Any) -> torch.Tensor:
        arguments, trained = tensors[:count], tensors[count:]
        ctx.module, ctx.count, ctx.trained = module, count, trained
        codes: list[torch.Tensor] = []
        ctx.layouts = []
        for index, x in enumerate(arguments[: module.activations]):
            coded = torch.sub(x, x.mean(-2, keepdim=True), out=x.new_empty(x.shape)) if index in module.centered else x
            codes += module.codec.encode(flat.rows(coded, GROUP))
            ctx.layouts.append(_Layout(x.shape, x.dtype, flat.is_channels_last(coded), x.requires_grad))
        ctx.circumstances = Circumstances(arguments[0])
        out = module.body(*arguments)
        ctx.circumstances.drawn()
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
        codes = [(next(kept), next(kept)) for _ in ctx.layouts]
        operands = [detached(next(kept)) if constant is None else constant for constant in ctx.constants]
        trained = [p for p in ctx.trained if p.requires_grad]
        wide = sum(layout.needs_grad for layout in ctx.layouts)
        total: list[torch.Tensor | None] | None = None
        with ctx.circumstances.replayed():
            for start, part in parts(grad, _images(module.images, ctx.layouts, grad)):
                place = (start, part.shape[0])
                inputs = [_decoded(module.codec, *each, place) for each in zip(codes, ctx.layouts, strict=True)]
                leaves = [t for t in inputs if t.requires_grad]
                others = [t for t in operands if isinstance(t, torch.Tensor) and t.requires_grad]
                with torch.enable_grad(), ctx.circumstances.autocast():
                    result = module.backward_body(*inputs, *operands)
                found = torch.autograd.grad(result, (*leaves, *others, *trained), part, allow_unused=True)
                del result, inputs, leaves
                total = list(found) if part.shape[0] == grad.shape[0] else _with_part(total, found, wide, place, grad.shape[0])
                del found
        assert total is not None
        gradients = iter(total)
        of_inputs = [next(gradients) if layout.needs_grad else None for layout in ctx.layouts]
        of_operands = [next(gradients) if isinstance(t, torch.Tensor) and t.requires_grad else None for t in operands]
        return None, None, *of_inputs, *of_operands, *gradients


def _images(images: int, layouts: Sequence[_Layout], grad: torch.Tensor) -> int:
    """How many of the first dimension go together: 0, all, unless every activation and its codes can be cut as the output is."""
    alike = all(
        layout.shape[0] == grad.shape[0] and len(layout.shape) > 2 and layout.shape[1:].numel() % GROUP == 0 for layout in layouts
    )
    return images if alike and not any(layout.channels_last for layout in layouts) else 0


def _decoded(codec: Rows, coded: Coded, layout: _Layout, place: tuple[int, int]) -> torch.Tensor:
    """The activation at a place, (first image, number of images)."""
    images, batch = place[1], layout.shape[0]
    coded = of_images(coded, place, batch)
    shape = torch.Size((images, *layout.shape[1:])) if images < batch else layout.shape
    values = flat.restore(codec.decode(coded), shape, layout.channels_last).to(layout.dtype)
    return values.detach().requires_grad_(layout.needs_grad)


def of_images(coded: tuple[torch.Tensor, ...], place: tuple[int, int], batch: int) -> Coded:
    """The rows of codes and ranges that are those of the images at a place; each of `batch` images has as many."""
    start, images = place
    if images == batch:  # a last row may be of several images
        return coded[0], coded[1]
    each = coded[0].shape[0] // batch
    rows = slice(start * each, (start + images) * each)
    return coded[0][rows], coded[1][rows]


def _with_part(
    total: list[torch.Tensor | None] | None, found: Sequence[torch.Tensor | None], wide: int, place: tuple[int, int], batch: int
) -> list[torch.Tensor | None]:
    """The gradients with those of one part: of activations, the first `wide`, put in their place, all others added up."""
    if total is None:
        total = [None if g is None else g.new_empty(batch, *g.shape[1:]) for g in found[:wide]] + [None] * len(found[wide:])
    for index, g in enumerate(found):
        whole = total[index]
        if g is not None and index < wide and whole is not None:
            whole[place[0] : sum(place)] = g
        elif g is not None:
            total[index] = g if whole is None else whole + g
    return total
