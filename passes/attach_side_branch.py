"""Attach a Lite Side Branch that reads every residual block (paper, eq. 5 and 6).

    before  x_i = block_i(x_{i-1});  head(feature)
    after   y_i = PW(DW(PW(CAP(x_i) + y_{i-1})));  head(feature, pool(y_last))

1. CAP shrinks a block's output C -> C / reduction without a parameter, keeps nothing, and is brought to one scale in all blocks.
2. Where stages change resolution or width, a 2x2 convolution of stride 2 carries y along.
3. The head reads C + C / r features. The columns for the backbone's features are the old head's; the new ones start at 0, so that
   the logits are at first the model's own.

Leaves alone: a block whose output is neither tokens nor a map with known channels.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from s2a_fx.errors import InputError, PassError
from s2a_fx.graph.edit import insert_call, splice_module
from s2a_fx.graph.heads import classification_heads
from s2a_fx.graph.layout import Layout, layout_of
from s2a_fx.graph.metadata import add_note
from s2a_fx.graph.structure import stages
from s2a_fx.nn.channel_average_pool import ChannelAveragePool
from s2a_fx.nn.lite_side_branch import LiteSideBlock, SideTransition, TapScale
from s2a_fx.passes.base import Pass, a_weight, building_like, require_not_negative, require_positive


@dataclass(frozen=True)
class AttachSideBranch(Pass):
    """Attach the side branch and widen the classification head.

    Args:
        reduction: r of eq. (5), by which the channels shrink; the paper takes 8. Must divide the channels of every block.
        skip: how many stages at the beginning go without.
        every: read every n-th block alone, the last of each n.
    """

    reduction: int = 8
    skip: int = 0
    every: int = 1

    def __post_init__(self) -> None:
        require_positive(self, reduction=self.reduction, every=self.every)
        require_not_negative(self, skip=self.skip)

    def rewrite(self, gm: fx.GraphModule) -> bool:
        heads = classification_heads(gm)
        if not heads:
            raise PassError(
                "AttachSideBranch: the model has no classification head to join (no linear layer from features to classes "
                "makes its output). Build it with num_classes > 0."
            )
        if any(path == "side_branch" for path, _ in gm.named_children()):
            raise PassError("AttachSideBranch: the model has a side branch already; apply the pass once.")
        taps = self._taps(gm, images=heads[0].meta["val"].shape[0])
        if not taps:
            raise PassError(
                "AttachSideBranch: found no residual block with a known layout to read; "
                "take a recipe without a side branch, such as bias."
            )
        with building_like(a_weight(gm)) as factory:
            side, channels = self._grow(gm, taps, factory)
            for index, head in enumerate(heads):
                if not _reads_pooled(head):
                    add_note(gm, "AttachSideBranch", head.name, "reads tokens or a map: the branch does not join this head")
                elif head.op == "call_module":
                    _widen_head(gm, head, index, side, channels)
                else:
                    _add_to_head(gm, head, index, side, channels, factory)
        return True

    def _taps(self, gm: fx.GraphModule, images: int) -> list[tuple[str, fx.Node, Layout]]:
        taps = []
        blocks = [block for stage in stages(gm)[self.skip :] for block in stage]
        for block in blocks[self.every - 1 :: self.every]:
            layout = layout_of(gm, block.output)
            if layout is None:
                add_note(gm, "AttachSideBranch", block.output.name, f"{block.path}: neither tokens nor a map with known channels")
                continue
            if block.output.meta["val"].shape[0] != images:
                add_note(gm, "AttachSideBranch", block.output.name, f"{block.path}: parts of images, which no map of one follows")
                continue
            if layout.channels % self.reduction:
                raise InputError(
                    f"AttachSideBranch: {block.path} has {layout.channels} channels, which reduction={self.reduction} does not "
                    f"divide; take a reduction that does."
                )
            taps.append((block.path, block.output, layout))
        return taps

    def _grow(self, gm: fx.GraphModule, taps: list[tuple[str, fx.Node, Layout]], factory: dict[str, Any]) -> tuple[fx.Node, int]:
        """Append the branch tap by tap; returns its last node and channels."""
        previous: fx.Node | None = None
        before = (0, (0, 0))
        for path, output, layout in taps:
            name = f"side_branch.{path.replace('.', '_')}"
            channels, grid = layout.channels // self.reduction, (layout.height, layout.width)
            with gm.graph.inserting_after(output):
                pool = ChannelAveragePool(path, layout.order, grid, layout.prefix, self.reduction)
                node = insert_call(gm, f"{name}.pool", pool, (output,))
            with gm.graph.inserting_after(node):
                node = insert_call(gm, f"{name}.scale", TapScale(), (node,))
            if previous is not None:
                if before != (channels, grid):
                    transition = SideTransition((before[0], channels), before[1], grid, **factory)
                    previous = splice_module(gm, f"{name}.transition", transition, (previous,), before=node.next)
                with gm.graph.inserting_after(max(node, previous)):
                    node = gm.graph.call_function(torch.add, (node, previous))
            previous = splice_module(gm, f"{name}.block", LiteSideBlock(channels, **factory), (node,), before=node.next)
            before = (channels, grid)
        assert previous is not None
        return previous, before[0]


def _reads_pooled(head: fx.Node) -> bool:
    """Whether a head reads one vector of each image."""
    value = head.all_input_nodes[0].meta["val"]
    return bool(value.ndim == 2 or tuple(value.shape[2:]) == (1, 1))


def _widen_head(gm: fx.GraphModule, node: fx.Node, index: int, side: fx.Node, side_channels: int) -> None:
    path = str(node.target)
    old = gm.get_submodule(path)
    convolutional = isinstance(old, nn.Conv2d)
    features = node.args[0]
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), *([] if convolutional else [nn.Flatten()]))
    with gm.graph.inserting_before(node):
        pooled = insert_call(gm, f"side_branch.head_pool{index}", pool, (side,))
        joined = gm.graph.call_function(torch.cat, ([features, pooled], 1))
    gm.set_submodule(path, _wider(old, side_channels).train(gm.training))
    node.args = (joined,)


def _add_to_head(gm: fx.GraphModule, node: fx.Node, index: int, side: fx.Node, channels: int, factory: dict[str, Any]) -> None:
    """Add a layer of the branch's features, at first 0, to a head that is no module: the wider head in two products."""
    layer = nn.Linear(channels, node.meta["val"].shape[-1], bias=False, **factory)
    nn.init.zeros_(layer.weight)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), layer)
    with gm.graph.inserting_after(max(node, side)):
        made = insert_call(gm, f"side_branch.head{index}", head, (side,))
    with gm.graph.inserting_after(made):
        joined = gm.graph.call_function(torch.add, (node, made))
    node.replace_all_uses_with(joined, delete_user_cb=lambda user: user is not joined)


def _wider(old: nn.Module, extra: int) -> nn.Module:
    """The same head for `extra` more input features, whose columns are 0."""
    assert isinstance(old, (nn.Linear, nn.Conv2d))
    factory: dict[str, Any] = {"device": old.weight.device, "dtype": old.weight.dtype}
    has_bias = old.bias is not None
    if isinstance(old, nn.Linear):
        new: nn.Linear | nn.Conv2d = nn.Linear(old.in_features + extra, old.out_features, has_bias, **factory)
    else:
        new = nn.Conv2d(old.in_channels + extra, old.out_channels, 1, bias=has_bias, **factory)
    with torch.no_grad():
        new.weight.zero_()
        new.weight[:, : old.weight.shape[1]].copy_(old.weight)
        if old.bias is not None:
            assert new.bias is not None
            new.bias.copy_(old.bias)
            new.bias.requires_grad_(old.bias.requires_grad)
    new.weight.requires_grad_(old.weight.requires_grad)
    return new
