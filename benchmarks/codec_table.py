"""How true the gradient stays under one codec at a time: operator by operator, bits by bits, beside codecs of the literature.

    python benchmarks/codec_table.py [--images 64] [--batch-size 16]

Real weights and images (see real_data.py), in train mode, every drop rate 0; biases and head are trained. The forward is exact in
every row, so one forward serves them all: operators keep exact tensors, and a row's codec is put on them as the backward reads
them. `exact` codes nothing. Bits are an element's, ranges included, of what is coded; kB an image add up all layers. A map's row of
50 tokens is padded to 56. A branch computed again from the x_hat of its norm keeps no q, k, v, map or GELU input: there, kB tell.
Cosines are fidelity.py's, means over the batches; the name is of the worst layer of all batches.

FewBit (Novikov et al., 2023): bins of least squared error of the slope under a prior. Its package ships bins for a flat one, found
by descent; the best are shown here, and those for N(0, 1). There, at 4 bits, the best and their mirror image are equally good:
GELU's slopes at x and -x add up to 1. Both are shown.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import mean
from typing import Any

import fidelity
import real_data
import record
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import nn

from s2a_fx.codecs.bins import PRIOR, Bins, _bins_of, best_bins, encode_bins, scale_by_bins
from s2a_fx.codecs.packing import MULTIPLE
from s2a_fx.codecs.powers import Powers
from s2a_fx.codecs.rows import dequantize, quantize
from s2a_fx.ops import uniform
from s2a_fx.ops.gelu import CLIP, derivative
from s2a_fx.ops.normalize import normalized
from s2a_fx.ops.softmax import map_gradients

Coded = tuple[torch.Tensor, float]
"""What the backward gets for a tensor, and the bytes kept of it. For GELU's input that is the slope."""
Codec = Callable[[torch.Tensor], Coded]

HEAD = 64  # channels of a head
SLOPES = (-0.1290, 1.1290)  # where GELU's derivative lies


@dataclass(frozen=True)
class Case:
    """Codecs of norm1, norm2, norm (the last), qkv, map and gelu; and the norms from whose x_hat the branch is computed again."""

    operator: str
    codec: str
    codecs: Mapping[str, Codec] = field(default_factory=dict)
    again: tuple[str, ...] = ()


def tensor(x: torch.Tensor, bits: int) -> Coded:
    """One range for the whole tensor: the paper's eq. (8) and (9)."""
    packed, range_ = uniform.encode(x.clone(), bits)
    return uniform.decode(packed, range_, bits, x.shape), packed.nbytes + range_.nbytes


def rows(x: torch.Tensor, bits: int, width: int = 0) -> Coded:
    """A range for each `width` elements; 0: for each row of the last dimension."""
    flat = x.reshape(-1, width or x.shape[-1])
    size = flat.shape[1]
    packed, ranges = quantize(torch.cat((flat, flat[:, -1:].expand(-1, -size % MULTIPLE)), 1), bits)
    return torch.cat(dequantize(packed, ranges, bits), 1)[:, :size].reshape(x.shape), packed.nbytes + ranges.nbytes


def rooted(x: torch.Tensor, bits: int, power: int) -> Coded:
    """Rows of the root: finer near 0."""
    codec = Powers(bits, power)
    coded = codec.encode(x.reshape(-1, x.shape[-1]))
    return codec.decode(coded, x.shape[-1]).reshape(x.shape), sum(t.nbytes for t in coded)


def slope(x: torch.Tensor) -> torch.Tensor:
    """GELU's derivative."""
    return torch.ops.aten.gelu_backward(torch.ones_like(x), x)


def sloped(x: torch.Tensor, bits: int) -> Coded:
    decoded, nbytes = rows(x, bits)
    return slope(decoded), nbytes


def paper_gelu(x: torch.Tensor) -> Coded:
    """Eq. (10) to (12)."""
    decoded, nbytes = tensor(x.clamp(-CLIP, CLIP), 4)
    return derivative(decoded), nbytes


def binned(x: torch.Tensor, bins: Bins) -> Coded:
    """The slope of the bin in which the input lies."""
    bits = (len(bins.levels) - 1).bit_length()
    packed = encode_bins(x.flatten(0, -2), list(bins.boundaries), bits)
    return scale_by_bins(torch.ones_like(x).flatten(0, -2), packed, list(bins.levels), bits).view_as(x), packed.nbytes


def random_slope(x: torch.Tensor, bits: int) -> Coded:
    """GELU's slope on an even scale, rounded up or down at random, right on average."""
    step = (SLOPES[1] - SLOPES[0]) / (2**bits - 1)
    codes = ((slope(x) - SLOPES[0]) / step + torch.rand_like(x)).floor().clamp(0, 2**bits - 1)
    return codes * step + SLOPES[0], x.numel() * bits / 8


def flat_bins(bits: int) -> Bins:
    """Best for x uniform over a range so wide that the outer slopes are all but 0 and 1."""
    x = torch.linspace(-20, 20, 2001, dtype=torch.float64)
    return _bins_of(x, slope(x), torch.ones_like(x), 2**bits)


def mirrored(bins: Bins) -> Bins:
    return Bins(tuple(-b for b in reversed(bins.boundaries)), tuple(1 - level for level in reversed(bins.levels)))


def norms(codec: Codec) -> dict[str, Codec]:
    return dict.fromkeys(("norm1", "norm2", "norm"), codec)


def gelus() -> Iterator[Case]:
    yield Case("GELU", "paper: 4 bits a tensor, eq. (10)-(12)", {"gelu": paper_gelu})
    normal = {bits: best_bins(F.gelu, bits, (0.0, 1.0)) for bits in (2, 3, 4)}
    tables = {f"FewBit: {bits}-bit bins, N(0, 1)": bins for bits, bins in normal.items()}
    tables["FewBit: 4-bit bins, N(0, 1), mirrored"] = mirrored(normal[4])
    tables |= {f"FewBit: {bits}-bit bins, flat": flat_bins(bits) for bits in (2, 3, 4)}
    tables |= {f"s2a: {bits}-bit bins, N{PRIOR}": best_bins(F.gelu, bits) for bits in (2, 3, 4)}
    for name, bins in tables.items():
        yield Case("GELU", name, {"gelu": partial(binned, bins=bins)})
    for bits in (4, 8):
        yield Case("GELU", f"{bits} bits a row", {"gelu": partial(sloped, bits=bits)})
    yield Case("GELU", "4-bit slope, rounded at random", {"gelu": partial(random_slope, bits=4)})


def other_operators() -> Iterator[Case]:
    yield Case("softmax map", "paper: 4 bits a tensor", {"map": partial(tensor, bits=4)})
    for bits in (4, 8):
        yield Case("softmax map", f"{bits} bits a row", {"map": partial(rows, bits=bits)})
    yield Case("softmax map", "4 bits a row of y^(1/3)", {"map": partial(rooted, bits=4, power=3)})
    yield Case("softmax map", "3 bits a row of y^(1/2)", {"map": partial(rooted, bits=3, power=2)})
    yield Case("layer norm", "4 bits a tensor", norms(partial(tensor, bits=4)))
    for bits in (3, 4, 6, 8):
        yield Case("layer norm", f"{bits} bits a row", norms(partial(rows, bits=bits)))
    yield Case("layer norm", "4 bits a group of 64", norms(partial(rows, bits=4, width=64)))
    for bits in (4, 5, 6, 8):
        yield Case("q, k, v; map again", f"{bits} bits a head's row", {"qkv": partial(rows, bits=bits, width=HEAD)})
    for branch, norm in (("attention", "norm1"), ("mlp", "norm2")):
        for bits in (5, 6, 8):
            yield Case(f"{branch} from x_hat", f"{bits} bits a row", {norm: partial(rows, bits=bits)}, (norm,))
        yield Case(f"{branch} from x_hat", "4 bits a group of 64", {norm: partial(rows, bits=4, width=64)}, (norm,))


def whole_models() -> Iterator[Case]:
    four, four_of_tensor = partial(rows, bits=4), partial(tensor, bits=4)
    paper = {"map": four_of_tensor, "gelu": paper_gelu}
    yield Case("all", "paper: map and GELU", paper)
    yield Case("all", "paper, and norms, q, k, v 4 bits a tensor", paper | norms(four_of_tensor) | {"qkv": four_of_tensor})
    for bits in (4, 8):
        row, head = partial(rows, bits=bits), partial(rows, bits=bits, width=HEAD)
        plain = norms(row) | {"qkv": head, "gelu": partial(sloped, bits=bits)}
        yield Case("all", f"plain: {bits} bits a row, map too", plain | {"map": row})
        yield Case("all", f"plain: {bits} bits a row, map again", plain)
    s2a = norms(four) | {"norm1": partial(rows, bits=6), "gelu": partial(binned, bins=best_bins(F.gelu, 4))}
    yield Case("all", "s2a: attention from 6-bit rows, rest 4 bits", s2a, ("norm1",))
    for name, codec in (("6-bit rows", partial(rows, bits=6)), ("4-bit groups of 64", partial(rows, bits=4, width=64))):
        yield Case("all", f"s2a-max: both from {name}", norms(codec) | {"norm": four}, ("norm1", "norm2"))


class Tape:
    """Gives the operators of one forward what they kept, as coded by the case at hand."""

    def start(self, case: Case) -> None:
        self.case, self.decoded, self.nbytes, self.elements = case, {}, 0.0, 0

    def read(self, what: str, layer: int, x: torch.Tensor) -> torch.Tensor:
        if what not in self.case.codecs:
            return slope(x) if what == "gelu" else x
        if (what, layer) not in self.decoded:  # a norm and the branch after it read the same codes
            self.decoded[what, layer], nbytes = self.case.codecs[what](x)
            self.nbytes, self.elements = self.nbytes + nbytes, self.elements + x.numel()
        return self.decoded[what, layer]


class Operator(torch.autograd.Function):
    """`function` of x; `gradient` makes x's gradient of x and the output's."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, function: Callable, gradient: Callable) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.gradient = gradient
        return function(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return ctx.gradient(*ctx.saved_tensors, grad), None, None


def normalize(x: torch.Tensor, eps: float, read: Callable) -> tuple[torch.Tensor, torch.Tensor]:
    """x_hat, and the same as it is kept."""
    with torch.no_grad():
        average, rstd = (v.view(*x.shape[:-1], 1) for v in normalized(x, None, None, eps, True)[1:])
        kept = (x - average) * rstd

    def gradient(_: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        x_hat = read(kept)
        return rstd * (grad - grad.mean(-1, keepdim=True) - x_hat * (grad * x_hat).mean(-1, keepdim=True))

    return Operator.apply(x, lambda _: kept.clone(), gradient), kept


def heads(qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return qkv.unflatten(2, (3, -1, HEAD)).permute(2, 0, 3, 1, 4).unbind()  # (B, heads, N, D) each


def attend(qkv: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(*heads(qkv)).transpose(1, 2).flatten(2)


def attend_gradient(qkv: torch.Tensor, grad: torch.Tensor, read_map: Callable) -> torch.Tensor:
    q, k, v = heads(qkv)
    y = read_map(torch.softmax(q @ k.mT * HEAD**-0.5, -1))
    grad_scores, grad_v = map_gradients(y, v, grad.unflatten(2, (-1, HEAD)).transpose(1, 2), y.new_empty(0), 0.0)
    grad_scores *= HEAD**-0.5
    return torch.stack((grad_scores @ k, grad_scores.mT @ q, grad_v)).permute(1, 3, 0, 2, 4).flatten(2)


def branch(x: torch.Tensor, norm: nn.LayerNorm, linear: nn.Module, function: Callable, gradient: Callable, read: Callable) -> Any:
    """`function` of `linear` of the norm; `read` gives x_hat as coded, and whether to start from it."""

    def inner(x_hat: torch.Tensor) -> torch.Tensor:
        return linear(x_hat * norm.weight + norm.bias)

    def from_kept(z: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        x_hat, again = read(kept)
        return gradient(inner(x_hat) if again else z, grad)

    x_hat, kept = normalize(x, norm.eps, lambda kept: read(kept)[0])
    return Operator.apply(inner(x_hat), function, from_kept)


def run_block(block: nn.Module, layer: int, x: torch.Tensor, tape: Tape) -> torch.Tensor:
    def read_norm(what: str, kept: torch.Tensor) -> tuple[torch.Tensor, bool]:
        return tape.read(what, layer, kept), what in tape.case.again

    def attention(qkv: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        return attend_gradient(tape.read("qkv", layer, qkv), grad, partial(tape.read, "map", layer))

    def gelu(z: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        return grad * tape.read("gelu", layer, z)

    y = branch(x, block.norm1, block.attn.qkv, attend, attention, partial(read_norm, "norm1"))
    x = x + block.ls1(block.attn.proj(y))
    y = branch(x, block.norm2, block.mlp.fc1, F.gelu, gelu, partial(read_norm, "norm2"))
    return x + block.ls2(block.mlp.fc2(y))


def forward(model: nn.Module, x: torch.Tensor, tape: Tape) -> torch.Tensor:
    """timm's ViT, its operators reading from `tape`."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    for layer, block in enumerate(model.blocks):
        x = run_block(block, layer, x, tape)
    x_hat, _ = normalize(x, model.norm.eps, partial(tape.read, "norm", 0))
    return model.head((x_hat * model.norm.weight + model.norm.bias)[:, 0])


def gradient_of(loss: torch.Tensor, trained: Mapping[str, nn.Parameter]) -> fidelity.Gradient:
    gradients = torch.autograd.grad(loss, list(trained.values()), retain_graph=True)
    return dict(zip(trained, (g.double().flatten() for g in gradients), strict=True))


def measure(model: nn.Module, x: torch.Tensor, labels: torch.Tensor, cases: Sequence[Case]) -> Iterator[fidelity.Row]:
    """The figures of each case on one batch."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    exact = gradient_of(F.cross_entropy(model(x), labels), trained)
    tape = Tape()
    loss = F.cross_entropy(forward(model, x, tape), labels)
    for case in cases:
        torch.manual_seed(fidelity.SEED)
        tape.start(case)
        figures = fidelity.compare(exact, gradient_of(loss, trained), ("head",))
        bits = 8 * tape.nbytes / tape.elements if tape.elements else 32.0
        yield {"bits an element": bits, "kB an image": tape.nbytes / len(x) / 1000, **figures}


def joined(case: Case, batches: Sequence[fidelity.Row]) -> fidelity.Row:
    columns = ("bits an element", "kB an image", "cosine", "before the head", "worst layer")
    lowest = min(batches, key=lambda figures: figures["worst layer"])
    means = {column: mean(figures[column] for figures in batches) for column in columns}
    return {"operator": case.operator, "codec": case.codec, **means, "its name": lowest["its name"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    options = parser.parse_args()
    torch.manual_seed(fidelity.SEED)
    model = real_data.vit_small().train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias") or name.startswith("head."))
    images, labels = (t.split(options.batch_size) for t in real_data.solar_cells(options.images))
    cases = [Case("nothing", "exact"), *other_operators(), *gelus(), *whole_models()]
    measured = zip(*(measure(model, *batch, cases) for batch in zip(images, labels, strict=True)), strict=True)
    table = [joined(case, batches) for case, batches in zip(cases, measured, strict=True)]
    print(tabulate(table, headers="keys", floatfmt=("", "", ".2f", ".0f", ".5f", ".5f", ".4f", "")))
    print(record.write("codec_table", {"images": options.images, "batch size": options.batch_size, "table": table}))


if __name__ == "__main__":
    main()
