"""Keep what autograd keeps in a few bits, operator by operator.

    before                                    keeps                  after                keeps
    two frozen layers around one of these     32 bits                CodedMLP             4 bits likewise; a few images at a time
    GELU, SiLU, Mish, sigmoid, ...            x or y, 32 bits        CodedActivation      4 bits: the bin of its derivative
    ReLU, ReLU6, leaky ReLU, clamp, ...       y, 32 bits             MaskedActivation     1 bit, exact
    dropout                                   a mask, 32 or 8 bits   CodedDropout         1 bit, exact
    layer norm, RMS norm                      x, 32 bits             CodedLayerNorm       4 bits of x_hat, 1 / sigma a row
    batch norm, group norm                    x, 32 bits             CodedBatchNorm, ...  8 bits of x
    convolution with a frozen weight          x, 32 bits             FrozenConvolution    nothing, exact
    a block of the side branch                five tensors           CodedInput           8 bits of its input
    fused attention                           q, k, v, output        CodedInput           4 bits of q, k, v; the map is recomputed
    any other operator, trained layers too    its inputs, 32 bits    CodedInput           8 bits of its inputs

A node is first tagged with its form and bits, `node.meta["s2a_fx.coding"]`; then the tagged nodes are replaced. What is left
at full width, the report says.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from s2a_fx.analysis.activations import activation
from s2a_fx.analysis.flow import dependent_nodes
from s2a_fx.analysis.full_width import keep_no_more_than
from s2a_fx.analysis.non_parametric import NonParametric, dropout_probability, non_parametric
from s2a_fx.analysis.normalized_branches import normalization, runs_once
from s2a_fx.analysis.provenance import module_stack, owner_path
from s2a_fx.analysis.saved import SavedTensor, is_activation, saved_tensors
from s2a_fx.codecs.packing import MULTIPLE
from s2a_fx.codecs.rows import Rows
from s2a_fx.errors import InputError
from s2a_fx.nn.coded import CodedActivation, CodedDropout, CodedLayerNorm, FrozenConvolution, MaskedActivation
from s2a_fx.nn.coded_input import GROUP, CodedInput
from s2a_fx.nn.lite_side_branch import LiteSideBlock
from s2a_fx.nn.recompute import can_be_ghost
from s2a_fx.ops.activation import BINNED
from s2a_fx.passes.base import Pass, call_inserted, free_path, replaced, snake_case
from s2a_fx.passes.forms_of_mlps import replace_mlp, serves_mlp
from s2a_fx.passes.forms_of_norms_and_pooling import (
    open_norm_activations,
    replace_batch_norm,
    replace_max_pool,
    serves_batch_norm,
    serves_max_pool,
)
from s2a_fx.passes.fuse_attention import zero_scores
from s2a_fx.passes.subgraphs import lifted

CODING = "s2a_fx.coding"

_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv)
_MAKES_MASKS = (zero_scores, operator.add, torch.add, "add", "view", "reshape", "transpose")


@dataclass(frozen=True)
class Coding:
    """How a node shall keep what it keeps: the `form` (a key of `FORMS`) and the bits an element."""

    form: str
    bits: int


@dataclass(frozen=True)
class CompressActivations(Pass):
    """Keep what autograd keeps in a few bits.

    Args:
        activation_bits: of an activation's derivative, 1 to 8.
        norm_bits: of a layer norm's or RMS norm's x_hat, 1 to 8.
        attention_bits: of q, k and v, 1 to 8; the map is computed again.
        input_bits: of all other inputs, 1 to 8.
        smallest: nodes that keep fewer bytes than this are left alone.
    """

    activation_bits: int = 4
    norm_bits: int = 4
    attention_bits: int = 4
    input_bits: int = 8
    smallest: int = 1 << 16

    def __post_init__(self) -> None:
        for bits in (self.activation_bits, self.norm_bits, self.attention_bits, self.input_bits):
            Rows(bits)
        if not isinstance(self.smallest, int) or self.smallest < 0:
            raise InputError(f"CompressActivations: smallest must be 0 or more bytes, got {self.smallest!r}.")

    def rewrite(self, gm: fx.GraphModule) -> bool:
        opened = open_norm_activations(gm)
        blocks = _side_blocks(gm)
        for nodes in blocks:
            _replace_by_coded_input(gm, nodes, self.input_bits)
        tagged = self.tag(gm)
        for node in tagged:
            FORMS[node.meta[CODING].form].replace(gm, node, node.meta[CODING].bits)
        keep_no_more_than(gm, self.smallest)
        return bool(opened or tagged or blocks)

    def tag(self, gm: fx.GraphModule) -> list[fx.Node]:
        """Write `node.meta["s2a_fx.coding"]` on every node that keeps an activation which a form serves; returns these nodes."""
        rows = [row for row in saved_tensors(gm) if is_activation(row)]
        kept: dict[str, int] = {}
        for row in rows:
            for name in {holder.node for holder in row.holders}:
                kept[name] = kept.get(name, 0) + row.bytes
        tagged = []
        for node in gm.graph.nodes:
            node.meta.pop(CODING, None)
            if kept.get(node.name, 0) < self.smallest:
                continue
            form = next((name for name, form in FORMS.items() if form.serves(gm, node)), None)
            if form is not None:
                node.meta[CODING] = Coding(form, self._bits(form))
                tagged.append(node)
        return [node for node in tagged if self._pays(node, rows, tagged)]

    def _bits(self, form: str) -> int:
        bits = {
            "mlp": self.activation_bits,
            "activation": self.activation_bits,
            "norm": self.norm_bits,
            "attention": self.attention_bits,
        }
        return bits.get(form, self.input_bits)

    def _pays(self, node: fx.Node, rows: list[SavedTensor], tagged: list[fx.Node]) -> bool:
        """Whether coding the node frees more than its codes take, once all tagged nodes are coded."""
        names = {n.name for n in tagged}
        freed = 0
        for row in rows:
            holders = {h.node for h in row.holders}
            if node.name in holders and holders <= names:
                freed += row.bytes // len(holders)
        if node.meta[CODING].form != "input":
            return freed > 0 or node.meta[CODING].form == "frozen_convolution"
        operands = [o.meta["val"].numel() for o in node.all_input_nodes if _is_float(o) and o.op != "get_attr"]
        return freed > sum(operands) * node.meta[CODING].bits // 8


@dataclass(frozen=True)
class Form:
    """One row of the table: which nodes it serves, and how it replaces one."""

    serves: Callable[[fx.GraphModule, fx.Node], bool]
    replace: Callable[[fx.GraphModule, fx.Node, int], None]


def _serves_binned(gm: fx.GraphModule, node: fx.Node) -> bool:
    found = activation(gm, node)
    return found is not None and found.name in BINNED


def _serves_masked(gm: fx.GraphModule, node: fx.Node) -> bool:
    found = activation(gm, node)
    return found is not None and found.name not in BINNED


def _replace_activation(gm: fx.GraphModule, node: fx.Node, bits: int) -> None:
    found = activation(gm, node)
    assert found is not None
    module = CodedActivation(found.name, bits) if found.name in BINNED else MaskedActivation(found.name, found.options)
    call = replaced(gm, node, module, (found.operand,))
    if found.inplace:  # later readers of the operand meant the overwritten one
        found.operand.replace_all_uses_with(call, delete_user_cb=lambda user: user > call)


def _serves_dropout(gm: fx.GraphModule, node: fx.Node) -> bool:
    return bool(dropout_probability(gm, node))


def _replace_dropout(gm: fx.GraphModule, node: fx.Node, bits: int) -> None:
    probability = dropout_probability(gm, node)
    assert probability is not None
    replaced(gm, node, CodedDropout(probability), (node.all_input_nodes[0],))


def _serves_norm(gm: fx.GraphModule, node: fx.Node) -> bool:
    return normalization(gm, node) is not None and node.meta["val"].shape[-1] % MULTIPLE == 0


def _replace_norm(gm: fx.GraphModule, node: fx.Node, bits: int) -> None:
    found = normalization(gm, node)
    assert found is not None
    rule, *names = found
    with gm.graph.inserting_before(node):
        parameters = [name and gm.graph.get_attr(name) for name in names]
    replaced(gm, node, CodedLayerNorm(rule.eps, rule.centered, bits), (node.all_input_nodes[0], *parameters))


def _convolution(gm: fx.GraphModule, node: fx.Node) -> Any:
    module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
    return module if can_be_ghost(module) and not isinstance(module, nn.Linear) else None


def _serves_frozen_convolution(gm: fx.GraphModule, node: fx.Node) -> bool:
    module = _convolution(gm, node)
    return module is not None and not module.weight.requires_grad


def _replace_frozen_convolution(gm: fx.GraphModule, node: fx.Node, bits: int) -> None:
    module = _convolution(gm, node)
    with gm.graph.inserting_before(node):
        weight = gm.graph.get_attr(f"{node.target}.weight")
        bias = None if module.bias is None else gm.graph.get_attr(f"{node.target}.bias")
    frozen = FrozenConvolution(module.stride, module.padding, module.dilation, module.groups)
    replaced(gm, node, frozen, (node.all_input_nodes[0], weight, bias))


def _serves_attention(gm: fx.GraphModule, node: fx.Node) -> bool:
    found = non_parametric(gm, node)
    return found is not None and found.kind == "attention"


def _replace_attention(gm: fx.GraphModule, node: fx.Node, bits: int) -> None:
    layer = non_parametric(gm, node)
    assert layer is not None
    # A dropped map does not add up to 1: a constant in the values then counts.
    nodes = _with_what_makes_its_mask(node, layer.operands[3:])
    plain = not layer.options["dropout_p"] and not layer.options["eval_dropout_p"]
    centered = [_source(n, nodes) for n in layer.operands[1:3]] if plain else []
    _replace_by_coded_input(gm, nodes, bits, centered, _images_at_a_time(layer, nodes) if plain else 0)


_PART_BYTES = 24 * 10**6
"""What an attention recomputed a few images at a time may allocate."""


def _images_at_a_time(layer: NonParametric, nodes: tuple[fx.Node, ...]) -> int:
    """Over how many images an attention is recomputed at a time; 0, all at once, where masks are made for more than one."""
    value: torch.Tensor = layer.node.meta["val"]
    outside = {o for n in nodes for o in n.all_input_nodes if o not in nodes} - {*layer.operands[:3]}
    elements = value[:1].numel()
    if any(isinstance(o.meta.get("val"), torch.Tensor) for o in outside) or not elements or elements % GROUP:
        return 0
    return max(1, _PART_BYTES // (8 * elements * value.element_size()))  # q, k, v, the output, and the gradient of each


def _source(node: fx.Node, inside: tuple[fx.Node, ...]) -> fx.Node | None:
    """Where keys or values come from, outside of the nodes; None if they lie transposed there."""
    turns = 0
    while node in inside and node.target == "transpose" and node.args[1:] == (-2, -1):
        node, turns = node.all_input_nodes[0], turns + 1
    return None if turns % 2 or node in inside else node


def _with_what_makes_its_mask(attention: fx.Node, masks: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
    """The attention, and what makes its mask for it alone: one as wide as the map is made again, not kept."""
    above = {*masks}
    run = {attention}
    for node in reversed(list(attention.graph.nodes)):
        makes = node in above or node.target == "transpose"  # keys are turned back and forth around a mask
        if makes and node.target in _MAKES_MASKS and node.users and all(user in run for user in node.users):
            run.add(node)
            above.update(node.all_input_nodes)
    return tuple(node for node in attention.graph.nodes if node in run)


def _serves_input(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Any operator that is a function of tensors: no batch norm, which would count a batch twice, nothing in place, no view."""
    value = node.meta.get("val")
    inputs = [o.meta.get("val") for o in node.all_input_nodes]
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or not inputs:
        return False
    if any(isinstance(v, list | tuple) for v in inputs):
        return False
    if node.op == "call_module":
        modules = gm.get_submodule(str(node.target)).modules()
        return not any(runs_once(m) or _is_coded(m) or getattr(m, "inplace", False) for m in modules)
    name = getattr(node.target, "__name__", str(node.target)).split(".")[0]
    in_place = name.endswith("_") or node.target in _IN_PLACE or bool(node.kwargs.get("inplace"))
    return node.op in ("call_function", "call_method") and "batch_norm" not in name and not in_place


def _is_coded(module: nn.Module) -> bool:
    return type(module).__module__.startswith("s2a_fx.nn")


def _replace_input(gm: fx.GraphModule, node: fx.Node, bits: int) -> None:
    _replace_by_coded_input(gm, (node,), bits)


def _replace_by_coded_input(
    gm: fx.GraphModule, nodes: tuple[fx.Node, ...], bits: int, centered: Sequence[fx.Node | None] = (), images: int = 0
) -> None:
    """Replace a run of nodes, the last of which is its output, by one `CodedInput`; `centered` are coded less their mean."""
    inside = set(nodes)
    outside = dict.fromkeys(o for n in nodes for o in n.all_input_nodes if o not in inside)
    dependent = dependent_nodes(gm)
    wide = [o for o in outside if o in dependent and _is_float(o)]
    operands = (*wide, *(o for o in outside if o not in wide))
    body, backward_body = lifted(gm, nodes, operands, _ghost(gm, nodes[-1]))
    places = tuple(index for index, operand in enumerate(wide) if operand in centered)
    module = CodedInput(body, backward_body, len(wide), bits, places, images)
    with gm.graph.inserting_before(nodes[-1]):
        path = free_path(gm, owner_path(nodes[-1]), snake_case(CodedInput))
        call = call_inserted(gm, path, module, operands, like=nodes[-1])
    call.meta["val"] = nodes[-1].meta["val"]
    nodes[-1].replace_all_uses_with(call)
    for node in reversed(nodes):
        gm.graph.erase_node(node)


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _ghost(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
    return node if can_be_ghost(module) else None


FORMS: dict[str, Form] = {
    "mlp": Form(serves_mlp, replace_mlp),
    "activation": Form(_serves_binned, _replace_activation),
    "mask": Form(_serves_masked, _replace_activation),
    "dropout": Form(_serves_dropout, _replace_dropout),
    "norm": Form(_serves_norm, _replace_norm),
    "frozen_convolution": Form(_serves_frozen_convolution, _replace_frozen_convolution),
    "attention": Form(_serves_attention, _replace_attention),
    "batch_norm": Form(serves_batch_norm, replace_batch_norm),
    "max_pool": Form(serves_max_pool, replace_max_pool),
    "input": Form(_serves_input, _replace_input),
}
"""Form -> which nodes it serves and how; the first that serves a node is taken."""


def _side_blocks(gm: fx.GraphModule) -> list[tuple[fx.Node, ...]]:
    """The runs of nodes that the blocks of the side branch are made of."""
    runs: dict[str, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        for path, kind in module_stack(node):
            if kind is LiteSideBlock:
                runs.setdefault(path, []).append(node)
    return [tuple(nodes) for nodes in runs.values() if len(nodes) > 1]
