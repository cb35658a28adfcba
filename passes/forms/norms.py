"""Layer norm, RMS norm and batch norm.

    before  layer norm, RMS norm         keeps x, 32 bits                after  CodedLayerNorm   4 bits of x_hat, 1 / sigma a row
    before  BatchNorm2d                  keeps x, 32 bits                after  CodedBatchNorm   8 bits, or nothing
    before  BatchNormAct2d (timm)        keeps x and f's, 32 bits        after  CodedBatchNorm, then its drop and activation

A batch norm's coded form stands under its path, so that no parameter or buffer is renamed; its drop and activation stand beside it,
where they stay when somebody freezes or converts the norm. Leaves alone: subclasses of batch norm, which may do more; rows that
cannot be packed.
"""

from typing import Any

from timm.layers import BatchNormAct2d
from torch import fx, nn

from s2a_fx.analysis.normalized_branches import normalization
from s2a_fx.codecs.packing import MULTIPLE
from s2a_fx.graph.edit import free_path, replace_node
from s2a_fx.graph.provenance import owner_stack
from s2a_fx.nn.coded import CodedLayerNorm
from s2a_fx.nn.coded_norms import BATCH_NORMS, CodedBatchNorm, taking_over


def serves_layer_norm(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is a layer norm or RMS norm over a last dimension that can be packed."""
    return normalization(gm, node) is not None and node.meta["val"].shape[-1] % MULTIPLE == 0


def replace_layer_norm(gm: fx.GraphModule, node: fx.Node, bits: int) -> None:
    """Replace the norm by its coded form; weight and bias stay where they are registered."""
    found = normalization(gm, node)
    assert found is not None
    rule, *names = found
    with gm.graph.inserting_before(node):
        parameters = [name and gm.graph.get_attr(name) for name in names]
    replace_node(gm, node, CodedLayerNorm(rule.eps, rule.centered, bits), (node.all_input_nodes[0], *parameters))


def open_norm_activations(gm: fx.GraphModule) -> bool:
    """Make a leaf that normalizes and activates three nodes: the batch norm, its drop, its activation; whether there was one."""
    leaves = [node for node in gm.graph.nodes if node.op == "call_module" and _is_norm_activation(gm, node)]
    layers: dict[str, dict[str, nn.Module]] = {}
    for node in leaves:
        norm: Any = gm.get_submodule(str(node.target))
        around = owner_stack(node).values()
        if str(node.target) not in layers:  # a module that is called twice is opened once
            _put(gm, node, taking_over(norm, nn.BatchNorm2d))
            layers[str(node.target)] = _put_beside(gm, str(node.target), norm)
        value, last = node.meta["val"], node
        for path, layer in layers[str(node.target)].items():
            with gm.graph.inserting_after(last):
                following = gm.graph.call_module(path, (last,))
            last.replace_all_uses_with(following, delete_user_cb=lambda user, new=following: user is not new)
            following.meta["val"] = value
            following.meta["nn_module_stack"] = {place: (place, kind) for place, kind in [*around, (path, type(layer))]}
            last = following
    return bool(leaves)


def _put_beside(gm: fx.GraphModule, path: str, norm: BatchNormAct2d) -> dict[str, nn.Module]:
    """Put a norm's drop and activation beside it, by path; what has parameters keeps its place, and so the names of these."""
    found: dict[str, nn.Module] = {}
    parent, _, own = path.rpartition(".")
    opened = gm.get_submodule(path)
    for name, layer in (("drop", norm.drop), ("act", norm.act)):
        if isinstance(layer, nn.Identity):
            continue
        place = f"{path}.{name}"
        if not layer.state_dict():
            place = free_path(gm, parent, f"{own}_{name}")
            gm.add_submodule(place, layer)
            delattr(opened, name)
        found[place] = layer
    return found


def _is_norm_activation(gm: fx.GraphModule, node: fx.Node) -> bool:
    return type(gm.get_submodule(str(node.target))) is BatchNormAct2d


def serves_batch_norm(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is a plain batch norm."""
    return node.op == "call_module" and type(gm.get_submodule(str(node.target))) in BATCH_NORMS


def replace_batch_norm(gm: fx.GraphModule, node: fx.Node, bits: int) -> None:
    """Put the coded form in the module's place; the graph stays as it is."""
    norm: Any = gm.get_submodule(str(node.target))
    if not isinstance(norm, CodedBatchNorm):  # a module that is called twice is replaced once
        _put(gm, node, CodedBatchNorm.of(norm, bits))


def _put(gm: fx.GraphModule, node: fx.Node, module: nn.Module) -> None:
    """Put `module` wherever the module that `node` calls is registered."""
    old = gm.get_submodule(str(node.target))
    for path in [path for path, present in gm.named_modules(remove_duplicate=False) if present is old]:
        gm.set_submodule(path, module)
        for n in gm.graph.nodes:
            if path in n.meta.get("nn_module_stack", {}):
                n.meta["nn_module_stack"] = {**n.meta["nn_module_stack"], path: (path, type(module))}
