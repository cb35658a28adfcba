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
    (plan "map")                              the same               CodedAttention       4 bits of q, k, v and the map
    any other operator, trained layers too    its inputs, 32 bits    CodedInput           8 bits of its inputs

A node is first tagged with its form and bits, `node.meta["s2a_fx.coding"]`; then the tagged nodes are replaced. What is left
at full width, the report says.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from s2a_fx.analysis.activations import activation
from s2a_fx.analysis.full_width import keep_no_more_than
from s2a_fx.analysis.non_parametric import dropout_probability
from s2a_fx.analysis.normalized_branches import normalization
from s2a_fx.analysis.provenance import module_stack
from s2a_fx.analysis.saved import SavedTensor, is_activation, saved_tensors
from s2a_fx.codecs.packing import MULTIPLE
from s2a_fx.codecs.rows import Rows
from s2a_fx.errors import InputError
from s2a_fx.nn.coded import CodedActivation, CodedDropout, CodedLayerNorm, FrozenConvolution, MaskedActivation
from s2a_fx.nn.lite_side_branch import LiteSideBlock
from s2a_fx.nn.recompute import can_be_ghost, has_hooks
from s2a_fx.ops.activation import BINNED
from s2a_fx.passes.base import Pass, replaced
from s2a_fx.passes.forms_of_attention import replace_attention, replace_attention_map, serves_attention, serves_attention_map
from s2a_fx.passes.forms_of_inputs import is_float, replace_by_coded_input, replace_input, serves_input
from s2a_fx.passes.forms_of_mlps import replace_mlp, serves_mlp
from s2a_fx.passes.forms_of_norms_and_pooling import (
    open_norm_activations,
    replace_batch_norm,
    replace_max_pool,
    serves_batch_norm,
    serves_max_pool,
)

CODING = "s2a_fx.coding"

_PLANS = ("recompute", "map")


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
        attention_bits: of q, k and v, 1 to 8.
        attention_plan: `recompute` the map, or keep the `map`, too, at as many bits: more kept, less computed.
        input_bits: of all other inputs, 1 to 8.
        smallest: nodes that keep fewer bytes than this are left alone.
    """

    activation_bits: int = 4
    norm_bits: int = 4
    attention_bits: int = 4
    attention_plan: str = "recompute"
    input_bits: int = 8
    smallest: int = 1 << 16

    def __post_init__(self) -> None:
        for bits in (self.activation_bits, self.norm_bits, self.attention_bits, self.input_bits):
            Rows(bits)
        if self.attention_plan not in _PLANS:
            raise InputError(f"CompressActivations: attention_plan must be {' or '.join(_PLANS)}, got {self.attention_plan!r}.")
        if not isinstance(self.smallest, int) or self.smallest < 0:
            raise InputError(f"CompressActivations: smallest must be 0 or more bytes, got {self.smallest!r}.")

    def rewrite(self, gm: fx.GraphModule) -> bool:
        opened = open_norm_activations(gm)
        blocks = _side_blocks(gm)
        for nodes in blocks:
            replace_by_coded_input(gm, nodes, self.input_bits)
        tagged = self.tag(gm)
        for node in tagged:
            coding = node.meta[CODING]
            if not FORMS[coding.form].serves(gm, node):  # the form of a neighbour took what it needs
                coding = self._coding(gm, node)
            if coding is not None:
                FORMS[coding.form].replace(gm, node, coding.bits)
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
            coding = self._coding(gm, node)
            if coding is not None:
                node.meta[CODING] = coding
                tagged.append(node)
        while idle := [node for node in tagged if not self._pays(node, rows, tagged)]:
            for node in idle:  # what it holds stays whole, and so may be what it shares with others
                del node.meta[CODING]
                tagged.remove(node)
        return tagged

    def _coding(self, gm: fx.GraphModule, node: fx.Node) -> Coding | None:
        """The first form that serves a node, and its bits; none serves a module with hooks, which must run once as it is."""
        if node.op == "call_module" and has_hooks(gm.get_submodule(str(node.target))):
            return None
        for name, form in FORMS.items():
            if (name != "attention_map" or self.attention_plan == "map") and form.serves(gm, node):
                return Coding(name, self._bits(name))
        return None

    def _bits(self, form: str) -> int:
        bits = {
            "mlp": self.activation_bits,
            "activation": self.activation_bits,
            "norm": self.norm_bits,
            "attention": self.attention_bits,
            "attention_map": self.attention_bits,
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
        operands = [o.meta["val"].numel() for o in node.all_input_nodes if is_float(o) and o.op != "get_attr"]
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


FORMS: dict[str, Form] = {
    "mlp": Form(serves_mlp, replace_mlp),
    "activation": Form(_serves_binned, _replace_activation),
    "mask": Form(_serves_masked, _replace_activation),
    "dropout": Form(_serves_dropout, _replace_dropout),
    "norm": Form(_serves_norm, _replace_norm),
    "frozen_convolution": Form(_serves_frozen_convolution, _replace_frozen_convolution),
    "attention_map": Form(serves_attention_map, replace_attention_map),
    "attention": Form(serves_attention, replace_attention),
    "batch_norm": Form(serves_batch_norm, replace_batch_norm),
    "max_pool": Form(serves_max_pool, replace_max_pool),
    "input": Form(serves_input, replace_input),
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
