"""Activations and dropout.

before  GELU, SiLU, Mish, sigmoid, ...   keeps x or y, 32 bits     after  CodedActivation    4 bits: the bin of its derivative
before  ReLU, ReLU6, leaky ReLU, ...     keeps y, 32 bits          after  MaskedActivation   1 bit, exact
before  dropout                          keeps a mask, 32 or 8     after  CodedDropout       1 bit, exact
"""

from torch import fx, nn

from s2a_fx.analysis.activations import activation, dropout_probability
from s2a_fx.graph.calls import call_of
from s2a_fx.graph.edit import replace_node
from s2a_fx.nn.coded import CodedActivation, CodedDropout, MaskedActivation
from s2a_fx.ops.activation import BINNED


def serves_binned(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is an activation with a smooth derivative."""
    found = activation(gm, node)
    return found is not None and found.name in BINNED


def serves_masked(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is an activation whose derivative has two values."""
    found = activation(gm, node)
    return found is not None and found.name not in BINNED


def replace_activation(gm: fx.GraphModule, node: fx.Node, bits: int) -> None:
    """Replace the activation by its coded form; masks take one bit whatever `bits` is."""
    found = activation(gm, node)
    assert found is not None
    module = CodedActivation(found.name, bits) if found.name in BINNED else MaskedActivation(found.name, found.options)
    _replace(gm, node, module, found.operand, found.inplace)


def serves_dropout(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is a dropout that drops anything."""
    return bool(dropout_probability(call_of(gm, node)))


def replace_dropout(gm: fx.GraphModule, node: fx.Node, bits: int) -> None:
    """Replace the dropout by the form that keeps one bit an element."""
    call = call_of(gm, node)
    probability = dropout_probability(call)
    assert call is not None and probability is not None
    _replace(gm, node, CodedDropout(probability), call.input, call.in_place == "input")


def _replace(gm: fx.GraphModule, node: fx.Node, module: nn.Module, operand: fx.Node, inplace: bool) -> None:
    new = replace_node(gm, node, module, (operand,))
    if inplace:  # later readers of the operand meant the overwritten one
        operand.replace_all_uses_with(new, delete_user_cb=lambda user: user > new)
