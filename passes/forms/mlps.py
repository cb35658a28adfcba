"""Two frozen linear layers around an activation.

    before  fc1 -> GELU -> dropout of 0 -> fc2      keeps fc1's output, 32 bits; makes it, and its gradient, whole
    after   CodedMLP                                keeps 4 bits an element, and makes it a few images at a time

Leaves alone layers whose weights train, layers with hooks, and what is read from elsewhere, too.
"""

from dataclasses import dataclass

from torch import fx, nn

from s2a_fx.analysis.activations import activation, dropout_probability
from s2a_fx.codecs.packing import MULTIPLE
from s2a_fx.graph.calls import call_of
from s2a_fx.graph.edit import replace_node
from s2a_fx.graph.regions import in_one_context
from s2a_fx.graph.torch_internals import has_hooks
from s2a_fx.nn.coded_mlp import CodedMLP
from s2a_fx.nn.ghost import can_be_ghost
from s2a_fx.ops.activation import BINNED


@dataclass(frozen=True)
class _MLP:
    first: fx.Node
    name: str
    between: tuple[fx.Node, ...]  # from the activation to the last before the second linear layer
    second: fx.Node


def serves_mlp(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is an activation between two frozen linear layers, read by the second alone."""
    return _mlp(gm, node) is not None


def replace_mlp(gm: fx.GraphModule, node: fx.Node, bits: int) -> None:
    """Replace both layers and the activation by one `CodedMLP`, where the first stands: what it reads may be overwritten later."""
    mlp = _mlp(gm, node)
    assert mlp is not None
    with gm.graph.inserting_before(mlp.first):
        parameters = [_parameter(gm, layer, name) for layer in (mlp.first, mlp.second) for name in ("weight", "bias")]
    operands = (mlp.first.all_input_nodes[0], *parameters)
    replace_node(gm, mlp.second, CodedMLP(mlp.name, bits), operands, before=mlp.first)
    for left in (*reversed(mlp.between), mlp.first):
        gm.graph.erase_node(left)


def _mlp(gm: fx.GraphModule, node: fx.Node) -> _MLP | None:
    found = activation(gm, node)
    if found is None or found.name not in BINNED or not _is_frozen_linear(gm, found.operand) or len(found.operand.users) != 1:
        return None
    if node.op == "call_module" and has_hooks(gm.get_submodule(str(node.target))):
        return None
    if found.operand.meta["val"].shape[-1] % MULTIPLE:
        return None
    between = [node]
    while len(between[-1].users) == 1:
        user = next(iter(between[-1].users))
        if _is_frozen_linear(gm, user):
            return _MLP(found.operand, found.name, tuple(between), user) if in_one_context(found.operand, *between, user) else None
        if not _does_nothing(gm, user):
            return None
        between.append(user)
    return None


def _is_frozen_linear(gm: fx.GraphModule, node: fx.Node) -> bool:
    module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
    return isinstance(module, nn.Linear) and can_be_ghost(module) and not module.weight.requires_grad


def _does_nothing(gm: fx.GraphModule, node: fx.Node) -> bool:
    module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
    if module is not None and has_hooks(module):
        return False
    return dropout_probability(call_of(gm, node)) == 0


def _parameter(gm: fx.GraphModule, layer: fx.Node, name: str) -> fx.Node | None:
    if getattr(gm.get_submodule(str(layer.target)), name) is None:
        return None
    return gm.graph.get_attr(f"{layer.target}.{name}")
