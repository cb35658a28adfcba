"""Checkpoint residual blocks: what a user picks today who runs out of memory.

    before  x = block(x)                      keeps what the block keeps
    after   x = checkpoint(block, x)          keeps x; the block runs again in the backward

Leaves alone, with a note: blocks through which no gradient flows; those that write to a buffer of the model or iterate a spectral
norm, which a second run would do again (running statistics of norms are safe); those that a later layer reads the inside of, such
as the size of a feature map.
"""

from dataclasses import dataclass

import torch
from torch import fx

from s2a_fx.errors import PassError
from s2a_fx.graph import torch_internals
from s2a_fx.graph.edit import free_path, insert_call, snake_case
from s2a_fx.graph.flow import has_effects, trained_nodes
from s2a_fx.graph.metadata import add_note
from s2a_fx.graph.regions import SCOPES, Region, modules_within
from s2a_fx.graph.scopes import scopes_around
from s2a_fx.graph.structure import Block, residual_blocks
from s2a_fx.nn.checkpointed import Checkpointed
from s2a_fx.nn.ghost import extract_bodies
from s2a_fx.passes.base import Pass


@dataclass(frozen=True)
class CheckpointBlocks(Pass):
    """Put `torch.utils.checkpoint` around every residual block."""

    def rewrite(self, gm: fx.GraphModule) -> bool:
        blocks = residual_blocks(gm)
        if not blocks:
            raise PassError(
                "CheckpointBlocks: found no residual block (nothing is added to what it is computed from); take another recipe."
            )
        trained = trained_nodes(gm)
        modified = False
        for block in blocks:
            if trained.isdisjoint(block.nodes):
                add_note(gm, "CheckpointBlocks", block.output.name, f"{block.path}: keeps nothing: no gradient flows through it")
            elif not _can_run_twice(gm, block):
                add_note(gm, "CheckpointBlocks", block.output.name, f"{block.path}: writes to a buffer, and cannot run twice")
            elif read := _read_outside(block):
                add_note(gm, "CheckpointBlocks", block.output.name, f"{block.path}: {read[0].name} inside it is read elsewhere")
            else:
                _replace(gm, block)
                modified = True
        return modified


def _read_outside(block: Block) -> list[fx.Node]:
    """The nodes of a block, besides its output, that others read."""
    inside = set(block.nodes)
    return [node for node in block.nodes if node is not block.output and not inside.issuperset(node.users)]


def _can_run_twice(gm: fx.GraphModule, block: Block) -> bool:
    """Whether no node of the block writes to what stands in the model, under whatever view, but for running statistics."""
    modules = [gm.get_submodule(str(node.target)) for node in block.nodes if node.op == "call_module"]
    if any(torch_internals.changes_with_each_run(inner) for module in modules for inner in modules_within(module)):
        return False
    writing = [node for node in block.nodes if has_effects(gm, node)]
    if any(node.op == "call_module" and isinstance(gm.get_submodule(str(node.target)), Region) for node in writing):
        return False
    read = [node.meta["val"] for node in gm.graph.find_nodes(op="get_attr")]
    own = {torch_internals.storage_key(value) for value in read if isinstance(value, torch.Tensor)}
    values = (operand.meta["val"] for node in writing for operand in node.all_input_nodes)
    return not any(torch_internals.storage_key(value) in own for value in values if isinstance(value, torch.Tensor))


def _replace(gm: fx.GraphModule, block: Block) -> None:
    inside = set(block.nodes)
    nodes = (*(n for n in block.nodes if n is not block.output), block.output)  # nothing but the output is read elsewhere
    operands = tuple(dict.fromkeys(o for n in nodes for o in n.all_input_nodes if o not in inside))
    module = Checkpointed(*extract_bodies(gm, nodes, operands, None))
    with gm.graph.inserting_before(block.output):
        call = insert_call(gm, free_path(gm, block.path, snake_case(Checkpointed)), module, operands, like=block.output)
    call.meta["val"] = block.output.meta["val"]
    call.meta[SCOPES] = scopes_around(nodes)
    block.output.replace_all_uses_with(call)
    for node in reversed(nodes):
        gm.graph.erase_node(node)
