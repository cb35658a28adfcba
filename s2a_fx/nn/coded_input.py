"""Any part of a model, kept as the codes of its inputs and recomputed from them in the backward.

For what no operator of its own serves: the side branch's layers, a trained convolution, the product of two activations. A code's
range holds for 64 neighbours in memory, of one image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx

from s2a_fx.codecs.rows import Coded, Rows
from s2a_fx.nn.compiled import DecodedRows, recomputed
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
from s2a_fx.ops import flat

GROUP = 64
"""Neighbours that share a range."""


@dataclass(frozen=True)
class Parts:
    """Over what parts of its first dimension a function is computed; each part must be a function of its own.

    Attributes:
        images: how many go at a time; 0 for all.
        together: how many neighbours belong to each other, the windows of an image: a part has all of them or none.
        forward: whether the forward is computed part by part, too.
    """

    images: int = 0
    together: int = 1
    forward: bool = False


WHOLE = Parts()


class CodedInput(Recomputed):
    """`body(*activations, *operands)`, recomputed in the backward from `bits` an element of the activations.

    Args:
        body, backward_body: from the activations and what else it reads, to the output; see `Recomputed`.
        activations: how many of the arguments are coded; the others are parameters and what is made of them.
        bits: of the codes, 1 to 8.
        centered: which of the activations are coded less their mean over the last dimension but one. Keys and values may be: the
            gradients of an attention do not change when a constant is added to all its keys, or to all its values.
        parts: over what parts of the first dimension it is recomputed.
    """

    def __init__(
        self,
        body: fx.GraphModule,
        backward_body: fx.GraphModule,
        activations: int,
        bits: int,
        centered: tuple[int, ...] = (),
        parts: Parts = WHOLE,
    ) -> None:
        super().__init__(body, backward_body)
        self.activations = activations
        self.codec = Rows(bits)
        self.centered = centered
        self.parts = parts

    def forward(self, *arguments: Any) -> torch.Tensor:
        trained = self.trained()
        if not needs_grad(*arguments, *trained):
            return self.body(*arguments)  # type: ignore[no-any-return]
        if torch.compiler.is_dynamo_compiling():
            return self.body(*arguments) if self.draws else self._compiled(*arguments)
        return _CodedInput.apply(self, len(arguments), *arguments, *trained)  # type: ignore[no-any-return]

    def _compiled(self, *arguments: Any) -> torch.Tensor:
        """`forward` for a compiler (see `nn/compiled.py`)."""
        activations, operands = arguments[: self.activations], arguments[self.activations :]
        with torch.no_grad():
            coded = [self._encoded(index, x) for index, x in enumerate(activations)]

        def part(*tensors: Any) -> torch.Tensor:
            given = tensors[: 3 * self.activations]
            decoded = [
                DecodedRows.apply(*given[3 * i : 3 * i + 3], self.codec.bits, flat.is_channels_last(x) and i not in self.centered)
                for i, x in enumerate(activations)
            ]
            return self.backward_body(*decoded, *tensors[3 * self.activations :])  # type: ignore[no-any-return]

        given = [t for x, codes in zip(activations, coded, strict=True) for t in (x, *codes)]
        return recomputed(lambda: self.body(*arguments), part, *given, *operands)

    def _encoded(self, index: int, x: torch.Tensor) -> Coded:
        if index in self.centered:
            mean = x.mean(-2, keepdim=True)
            compiling = torch.compiler.is_dynamo_compiling()  # a compiler takes the strides of x for those of `out`
            x = x.contiguous() - mean if compiling else torch.sub(x, mean, out=x.new_empty(x.shape))
        return self.codec.encode(flat.groups(x, GROUP))

    def run_at_once(self) -> None:
        self.parts = WHOLE

    def extra_repr(self) -> str:
        return f"activations={self.activations}, bits={self.codec.bits}, centered={self.centered}, {self.parts}"


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
            codes += module._encoded(index, x)
            channels_last = flat.is_channels_last(x) and index not in module.centered
            ctx.layouts.append(_Layout(x.shape, x.dtype, channels_last, x.requires_grad))
        ctx.state = ReplayState(module.body, *tensors)
        out = _output(module, arguments, _parts(module.parts, ctx.layouts) if module.parts.forward else WHOLE)
        ctx.state.end_forward()
        operands = arguments[module.activations :]
        ctx.saved_names = ("codes", "ranges") * module.activations + ("operand",)
        ctx.save_for_backward(*codes, *(t for t in operands if isinstance(t, torch.Tensor)))
        ctx.constants = without_tensors(operands)
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        refuse_second_derivative()
        module: CodedInput = ctx.module
        kept = iter(ctx.saved_tensors)
        codes = [(next(kept), next(kept)) for _ in ctx.layouts]
        operands = list(map(as_leaf, with_tensors(ctx.constants, kept), ctx.needs_input_grad[2 + module.activations :]))
        wide = sum(layout.needs_grad for layout in ctx.layouts)
        total: list[torch.Tensor | None] | None = None
        wanted = _parts(module.parts, ctx.layouts)
        with ctx.state.replay():
            for start, part in parts(grad, wanted.images, wanted.together):
                place = (start, part.shape[0])
                inputs = [_decoded(module.codec, *each, place) for each in zip(codes, ctx.layouts, strict=True)]
                leaves = [t for t in inputs if t.requires_grad]
                others = [t for t in operands if isinstance(t, torch.Tensor) and t.requires_grad]
                with torch.enable_grad(), ctx.state.autocast():
                    result = module.backward_body(*inputs, *operands)
                found = torch.autograd.grad(result, (*leaves, *others, *ctx.trained), part, allow_unused=True)
                del result, inputs, leaves
                total = list(found) if part.shape[0] == grad.shape[0] else _with_part(total, found, wide, place, grad.shape[0])
                del found
        assert total is not None
        gradients = iter(total)
        of_inputs = [next(gradients) if layout.needs_grad else None for layout in ctx.layouts]
        of_operands = [next(gradients) if isinstance(t, torch.Tensor) and t.requires_grad else None for t in operands]
        return None, None, *of_inputs, *of_operands, *gradients


def _parts(wanted: Parts, layouts: Sequence[_Layout]) -> Parts:
    """The parts, or the whole unless every activation and its codes can be cut alike."""
    if not wanted.images:
        return WHOLE
    first = layouts[0].shape[0]
    alike = all(layout.shape[0] == first and len(layout.shape) > 2 and not layout.channels_last for layout in layouts)
    return wanted if alike else WHOLE


def _output(module: CodedInput, arguments: Sequence[Any], wanted: Parts) -> torch.Tensor:
    """The body's output, computed part by part."""
    first = arguments[0]
    if not wanted.images or wanted.images >= first.shape[0]:
        return module.body(*arguments)  # type: ignore[no-any-return]
    whole: torch.Tensor | None = None
    for start, part in parts(first, wanted.images, wanted.together):
        count = part.shape[0]
        pieces = [x[start : start + count] for x in arguments[: module.activations]]
        result = module.body(*pieces, *arguments[module.activations :])
        if whole is None:
            whole = result.new_empty_strided((first.shape[0], *result.shape[1:]), result.stride())
        whole[start : start + count] = result
        del result
    assert whole is not None
    return whole


def _decoded(codec: Rows, coded: Coded, layout: _Layout, place: tuple[int, int]) -> torch.Tensor:
    """The activation at a place, (first image, number of images)."""
    images, batch = place[1], layout.shape[0]
    coded = of_images(coded, place, batch)
    shape = torch.Size((images, *layout.shape[1:])) if images < batch else layout.shape
    values = flat.restore_groups(codec.decode(coded), shape, layout.channels_last).to(layout.dtype)
    return values.detach().requires_grad_(layout.needs_grad)


def of_images(coded: tuple[torch.Tensor, ...], place: tuple[int, int], batch: int) -> Coded:
    """The rows of codes and ranges that are those of the images at a place; each of `batch` images has as many."""
    start, images = place
    if images == batch:  # none, perhaps
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
