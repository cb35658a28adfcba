"""Give every block learned prompts beside its input (VPT, the deep form; the paper's eq. 14).

    tokens          before  block(x)              after  block([class token, prompts, x]) without the prompts
    windows         before  attention(windows)    after  attention([windows, prompts]) without the prompts, in every window
    convolutions    before  block(x)              after  block(x in a learned border) without the border

Prompts keep nothing themselves; what the block makes of them, autograd keeps as it keeps the rest. The authors' windows get their
prompts before the block's first norm; here they come after it, as they are.

Leaves alone, with a note: blocks that change the size of a map, attention over maps that is not windowed, and layouts unknown.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from s2a_fx.analysis.attention_map import computes_map
from s2a_fx.errors import PassError
from s2a_fx.graph.calls import call_of, operator_of
from s2a_fx.graph.edit import free_path, insert_call
from s2a_fx.graph.flow import dependent_nodes
from s2a_fx.graph.layout import Layout, layout_of
from s2a_fx.graph.metadata import Note, add_note
from s2a_fx.graph.provenance import module_stack, owner_path
from s2a_fx.graph.shapes import propagate
from s2a_fx.graph.structure import Block, stages
from s2a_fx.nn.visual_prompt import PromptBorder, PromptTokens
from s2a_fx.passes.base import Pass, a_weight, building_like, require_not_negative, require_positive


@dataclass(frozen=True)
class InsertVisualPrompt(Pass):
    """Insert prompts at each residual block.

    Args:
        tokens: prompts of a block of tokens, and of each window of a windowed attention; a border has as many as it is long.
        skip: how many stages at the beginning go without.
    """

    tokens: int = 50
    skip: int = 0

    def __post_init__(self) -> None:
        require_positive(self, tokens=self.tokens)
        require_not_negative(self, skip=self.skip)

    def rewrite(self, gm: fx.GraphModule) -> bool:
        blocks = [block for stage in stages(gm)[self.skip :] for block in stage]
        if not blocks:
            raise PassError("InsertVisualPrompt: found no residual block in the stages that are not skipped; take another recipe.")
        found = [_place(gm, block) for block in reversed(blocks)]  # an earlier block's output is then still as it was found
        places = [place for place in found if isinstance(place, _Place)]
        for place in places:
            self._check(gm, place)
        for note in found:
            if isinstance(note, Note):
                add_note(gm, note.source, note.node, note.reason)
        for place in places:
            self._insert(gm, place)
        return bool(places)

    def _check(self, gm: fx.GraphModule, place: "_Place") -> None:
        """Raise `PassError` if the block does not run on more tokens; the graph is left as it is."""
        wider = self._wider(place)
        before = {node: node.meta["val"] for node in (*wider, *place.nodes)}
        for node in place.nodes:
            del node.meta["val"]
        for node, padding in wider.items():
            node.meta["val"] = F.pad(before[node], padding)
        try:
            propagate(gm)
        except Exception as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise PassError(
                f"InsertVisualPrompt: {place.block.path} was built for its number of tokens and takes no more ({reason}); "
                "take another recipe, such as bias+lrp."
            ) from error
        finally:
            for node, value in before.items():
                node.meta["val"] = value

    def _wider(self, place: "_Place") -> dict[fx.Node, tuple[int, ...]]:
        """What becomes wider by prompts, and how much at which end, as `F.pad` takes it."""
        if place.layout.order == "BNC":
            return {place.block.entry: (0, 0, self.tokens, 0)}
        if place.windows is not None:
            biases = {bias: (self.tokens, 0, self.tokens, 0) for _, bias in place.windows.biases()}
            return {place.windows.entry: (0, 0, self.tokens, 0), **biases}
        return {place.block.entry: (1, 1, 1, 1) if place.layout.order == "BCHW" else (0, 0, 1, 1, 1, 1)}

    def _insert(self, gm: fx.GraphModule, place: "_Place") -> None:
        if place.layout.order == "BNC":
            self._around_tokens(gm, place.block, place.layout)
        elif place.windows is not None:
            self._in_windows(gm, place.windows)
        else:
            _around_map(gm, place.block, place.layout)
        for node in place.nodes:
            node.meta.pop("val", None)

    def _around_tokens(self, gm: fx.GraphModule, block: Block, layout: Layout) -> None:
        readers = [user for user in block.entry.users if user in block.nodes]
        with building_like(a_weight(gm)) as factory:
            prompt = PromptTokens(self.tokens, layout.channels, layout.prefix, **factory)
        _read_through(gm, block.path, prompt, block.entry, readers)  # outside of the block, as is what leaves the prompts out
        whole = slice(None)
        with gm.graph.inserting_before(block.output.next):
            kept = gm.graph.call_function(operator.getitem, (block.output, (whole, slice(layout.prefix + self.tokens, None))))
            new = [kept]
            if layout.prefix:
                first = gm.graph.call_function(operator.getitem, (block.output, (whole, slice(None, layout.prefix))))
                kept = gm.graph.call_function(torch.cat, ([first, kept], 1))
                new.append(first)
        block.output.replace_all_uses_with(kept, delete_user_cb=lambda user: user not in new)

    def _in_windows(self, gm: fx.GraphModule, windows: "_Windows") -> None:
        channels = windows.entry.meta["val"].shape[2]
        with building_like(a_weight(gm)) as factory:
            prompt = PromptTokens(self.tokens, channels, **factory)
        _read_through(gm, windows.path, prompt, windows.entry, windows.readers, inside=True)
        for node, bias in windows.biases():
            with gm.graph.inserting_before(node):  # prompts have no place: they are as near to one token as to another
                wider = gm.graph.call_function(F.pad, (bias, (self.tokens, 0, self.tokens, 0)))
            wider.meta["nn_module_stack"] = node.meta["nn_module_stack"]
            node.replace_input_with(bias, wider)
        with gm.graph.inserting_before(windows.output.next):
            kept = gm.graph.call_function(operator.getitem, (windows.output, (slice(None), slice(self.tokens, None))))
        kept.meta["nn_module_stack"] = windows.map.meta["nn_module_stack"]
        windows.output.replace_all_uses_with(kept, delete_user_cb=lambda user: user is not kept)


@dataclass(frozen=True)
class _Windows:
    """An attention over windows of a map: its path, map and nodes, those that take a bias of the map, the windows (rows, tokens, C)
    that it reads, what it makes.
    """

    path: str
    map: fx.Node
    biased: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    entry: fx.Node
    readers: tuple[fx.Node, ...]
    output: fx.Node
    dependent: set[fx.Node]

    def biases(self) -> list[tuple[fx.Node, fx.Node]]:
        """What is added to the map of each window, token by token, and the node that adds it."""
        tokens = self.entry.meta["val"].shape[1]
        added = [(node, bias) for node in self.biased for bias in node.all_input_nodes if bias not in self.dependent]
        shapes = {bias: getattr(bias.meta.get("val"), "shape", ()) for _, bias in added}
        return [(node, bias) for node, bias in added if shapes[bias][-2:] == (tokens, tokens)]


@dataclass(frozen=True)
class _Place:
    """A block that can have prompts; `windows` if they go into its attention."""

    block: Block
    layout: Layout
    windows: _Windows | None

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The nodes that see prompts."""
        return self.block.nodes if self.windows is None else self.windows.nodes


def _place(gm: fx.GraphModule, block: Block) -> _Place | Note:
    """Where a block has its prompts, or why it has none."""
    layout = layout_of(gm, block.entry)
    windows = _windows(gm, block) if layout is not None and layout.order != "BNC" else None
    if layout is None:
        reason = "neither tokens nor a map with known channels"
    elif layout.order == "BNC" or windows is not None:
        return _Place(block, layout, windows)
    elif _attentions(gm, block):
        reason = "its attention is over neither tokens nor windows"
    elif layout_of(gm, block.output) != layout:
        reason = "changes the size of its map"
    else:
        return _Place(block, layout, None)
    return Note("InsertVisualPrompt", block.entry.name, f"{block.path}: {reason}")


def _windows(gm: fx.GraphModule, block: Block) -> _Windows | None:
    """The attention of a block of maps, if it has one module, one input of three dimensions and one output like it."""
    maps = _attentions(gm, block)
    if len(maps) != 1:
        return None
    path = owner_path(maps[0])
    nodes = tuple(n for n in block.nodes if any(place == path for place, _ in module_stack(n)) and n.target != path)
    dependent = dependent_nodes(gm)
    entries = {o for n in nodes for o in n.all_input_nodes if o not in nodes and o in dependent and _rank(o) == 3}
    outputs = {n for n in nodes if any(user not in nodes for user in n.users) and _rank(n) == 3}
    if len(entries) != 1 or len(outputs) != 1:
        return None
    (entry,), (output,) = entries, outputs
    biased = tuple(n for n in nodes if n is maps[0] or operator_of(gm, n) is torch.add)
    return _Windows(path, maps[0], biased, nodes, entry, tuple(n for n in entry.users if n in nodes), output, dependent)


def _attentions(gm: fx.GraphModule, block: Block) -> list[fx.Node]:
    return [node for node in block.nodes if computes_map(call_of(gm, node))]


def _rank(node: fx.Node) -> int:
    value: Any = node.meta.get("val")
    return value.ndim if isinstance(value, torch.Tensor) else 0


def _around_map(gm: fx.GraphModule, block: Block, layout: Layout) -> None:
    readers = [user for user in block.entry.users if user in block.nodes]
    order: Any = layout.order
    with building_like(a_weight(gm)) as factory:
        prompt = PromptBorder(block.path, order, (layout.height, layout.width), layout.channels, **factory)
    _read_through(gm, block.path, prompt, block.entry, readers)
    inner, whole = slice(1, -1), slice(None)
    place = (whole, whole, inner, inner) if layout.order == "BCHW" else (whole, inner, inner)
    with gm.graph.inserting_before(block.output.next):
        kept = gm.graph.call_function(operator.getitem, (block.output, place))
    block.output.replace_all_uses_with(kept, delete_user_cb=lambda user: user is not kept)


def _read_through(
    gm: fx.GraphModule, parent: str, prompt: nn.Module, value: fx.Node, readers: Sequence[fx.Node], inside: bool = False
) -> None:
    """Let `readers` read `prompt(value)` in the place of `value`; `inside`: it belongs to the module that they belong to."""
    with gm.graph.inserting_before(min(readers)):
        path = free_path(gm, parent, "visual_prompt")
        call = insert_call(gm, path, prompt, (value,), like=min(readers) if inside else None)
    for reader in readers:
        reader.replace_input_with(value, call)
