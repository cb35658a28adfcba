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

from torch import fx

from s2a_fx.analysis.saved import SavedTensor, is_activation, saved_tensors
from s2a_fx.codecs.rows import Rows
from s2a_fx.errors import InputError
from s2a_fx.graph.metadata import record_of
from s2a_fx.graph.torch_internals import has_hooks
from s2a_fx.passes.base import Pass
from s2a_fx.passes.forms import activations, attention, convolutions, inputs, mlps, norms

CODING = "s2a_fx.coding"

_PLANS = ("recompute", "map")


@dataclass(frozen=True)
class Coding:
    """How a node shall keep what it keeps: the `form` (a key of `FORMS`) and the bits an element."""

    form: str
    bits: int


@dataclass(frozen=True)
class Form:
    """One row of the table: which nodes it serves, how it replaces one, and the option that says in how many bits."""

    serves: Callable[[fx.GraphModule, fx.Node], bool]
    replace: Callable[[fx.GraphModule, fx.Node, int], None]
    bits: str = "input_bits"


FORMS: dict[str, Form] = {
    "mlp": Form(mlps.serves_mlp, mlps.replace_mlp, "activation_bits"),
    "activation": Form(activations.serves_binned, activations.replace_activation, "activation_bits"),
    "mask": Form(activations.serves_masked, activations.replace_activation),
    "dropout": Form(activations.serves_dropout, activations.replace_dropout),
    "norm": Form(norms.serves_layer_norm, norms.replace_layer_norm, "norm_bits"),
    "frozen_convolution": Form(convolutions.serves_frozen_convolution, convolutions.replace_frozen_convolution),
    "attention_map": Form(attention.serves_map, attention.replace_map, "attention_bits"),
    "attention": Form(attention.serves_attention, attention.replace_attention, "attention_bits"),
    "batch_norm": Form(norms.serves_batch_norm, norms.replace_batch_norm),
    "max_pool": Form(convolutions.serves_max_pool, convolutions.replace_max_pool),
    "input": Form(inputs.serves_input, inputs.replace_input),
}
"""Form -> which nodes it serves and how; the first that serves a node is taken."""


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
        opened = norms.open_norm_activations(gm)
        blocks = inputs.side_blocks(gm)
        for nodes in blocks:
            inputs.replace_by_coded_input(gm, nodes, self.input_bits)
        tagged = self.tag(gm)
        for node in tagged:
            coding = node.meta[CODING]
            if not FORMS[coding.form].serves(gm, node):  # the form of a neighbour took what it needs
                coding = self._coding(gm, node)
            if coding is not None:
                FORMS[coding.form].replace(gm, node, coding.bits)
        record_of(gm).report_from = self.smallest
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
                return Coding(name, getattr(self, form.bits))
        return None

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
        operands = [o.meta["val"].numel() for o in node.all_input_nodes if inputs.is_float(o) and o.op != "get_attr"]
        return freed > sum(operands) * node.meta[CODING].bits // 8
