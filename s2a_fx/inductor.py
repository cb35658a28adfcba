"""Coding what a compiled step saves, inside a pipeline that has its own backend and its own model.

Two hooks of torch.compile, and one codec for both: every tensor that the forward hands to the backward is kept in a few bits,
whatever operator saved it. Nothing of the model is rewritten.

    with saved_tensor_hooks(bits=8):                                                a region of code
        loss = compiled(x).sum()

    torch.compile(model, options={"custom_partitioner_fn": CodingPartitioner(8)})   a compiled model

What is whose: `torch.autograd.graph.saved_tensors_hooks` is public; that AOTAutograd inlines hooks given as graph modules, and
Inductor's `custom_partitioner_fn`, are not declared stable. A graph pass of Inductor's comes too early for this: which tensors are
saved is decided by the partitioner. Both ask at the door whether this version of torch has what they need.

A saved tensor is left as it is when it is small, is no floating tensor, is expanded, or is an input or output of the model; by the
partitioner also where its size is symbolic (the hooks code it). What holds infinities, such as an attention's own float mask,
cannot be coded: its gradients become NaN; give a boolean mask.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from s2a_fx.codecs.rows import Rows
from s2a_fx.errors import InputError
from s2a_fx.graph import torch_internals
from s2a_fx.nn.coded_input import GROUP

CustomPartitionerFn: Any
CustomPartitionerFn, get_hash_for_files = torch_internals.partitioner_interface()

Packed = tuple[Any, ...]


@dataclass(frozen=True)
class SavedCodec:
    """How a saved tensor is packed.

    Args:
        bits: of an element, 1 to 8; a range for each group, in the order in which they lie in memory.
        group: elements that share a range.
        smallest: tensors of fewer bytes are left alone.
    """

    bits: int = 8
    smallest: int = 1 << 16
    group: int = GROUP

    def __post_init__(self) -> None:
        Rows(self.bits)
        if not isinstance(self.smallest, int) or self.smallest < 0:
            raise InputError(f"smallest must be 0 or more bytes, got {self.smallest!r}.")

    def serves(self, x: torch.Tensor) -> bool:
        """Whether coding `x` frees anything."""
        if not x.is_floating_point() or x.numel() * x.element_size() < self.smallest:
            return False
        return x.numel() % self.group == 0 and 0 not in x.stride()

    def pack(self, x: torch.Tensor) -> Packed:
        """(codes, ranges, shape in memory order, order, dtype), or (x,) where it is left alone."""
        if not self.serves(x):
            return (x,)
        order = _memory_order(x)
        in_memory = x.permute(order)
        return (*Rows(self.bits).encode(in_memory.reshape(-1, self.group)), list(in_memory.shape), order, x.dtype)

    def unpack(self, packed: Packed) -> torch.Tensor:
        """The tensor that `pack` was given, to within half a step."""
        if len(packed) == 1:
            return packed[0]  # type: ignore[no-any-return]
        codes, ranges, shape, order, dtype = packed
        values = Rows(self.bits).decode((codes, ranges)).to(dtype).reshape(shape)
        return values.permute([order.index(dimension) for dimension in range(len(order))])


def _memory_order(x: torch.Tensor) -> list[int]:
    """The dimensions of `x`, those that lie furthest apart first."""
    strides: tuple[int, ...] = x.stride()
    return sorted(range(x.ndim), key=lambda dimension: -strides[dimension])


def saved_tensor_hooks(bits: int = 8, smallest: int = 1 << 16) -> torch.autograd.graph.saved_tensors_hooks:
    """A context in which compiled code keeps what it saves in `bits` an element: see `SavedCodec`.

    AOTAutograd makes the hooks part of the forward and backward graphs of what is called inside; other options, or none, are
    another compilation.

    Outside of compiled code they work too, operator by operator, on weights as well: there `transform` keeps less.

    Raises:
        InputError: an option does not fit, or this torch does not inline hooks.
    """
    codec = SavedCodec(bits, smallest)
    _require(torch_internals.inlines_saved_tensor_hooks(), "inlined hooks")
    return torch.autograd.graph.saved_tensors_hooks(*_graphs(codec))


@functools.cache
def _graphs(codec: SavedCodec) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The hooks of a codec, the same ones each time: to Dynamo new ones would be other code."""
    return _graph_of(codec.pack), _graph_of(codec.unpack)


def _graph_of(function: Any) -> fx.GraphModule:
    """A graph that calls `function` on its one argument: what AOTAutograd takes for a hook to inline."""
    graph = fx.Graph()
    graph.output(graph.call_function(function, (graph.placeholder("saved"),)))
    return fx.GraphModule(torch.nn.Module(), graph)


class CodingPartitioner(CustomPartitionerFn):
    """Inductor's partitioner, and then a code in the place of every tensor that it lets the forward save.

    Args:
        bits, smallest: see `SavedCodec`.

    Raises:
        InputError: an option does not fit, or this torch lets nobody partition.
    """

    def __init__(self, bits: int = 8, smallest: int = 1 << 16) -> None:
        _require(get_hash_for_files is not None, "custom_partitioner_fn")
        self.codec = SavedCodec(bits, smallest)

    def __call__(self, gm: fx.GraphModule, joint_inputs: Sequence[object], **options: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        forward, backward = torch_internals.min_cut_partition(gm, joint_inputs, **options)
        results: Any = forward.graph.output_node().args[0]
        own, saved = results[: options["num_fwd_outputs"]], results[options["num_fwd_outputs"] :]
        readers = {node.name: node for node in backward.graph.find_nodes(op="placeholder")}
        kept: list[Any] = []
        for node in saved:
            value = node.meta["val"]
            mine = node.op != "placeholder" and node not in own and isinstance(value, torch.Tensor)
            if mine and _is_static(value) and self.codec.serves(value):
                kept += self._code(forward.graph, backward.graph, node, readers[node.name])
            else:
                kept.append(node)
        forward.graph.output_node().args = ((*own, *kept),)
        for graph in (forward, backward):
            graph.graph.lint()
            graph.recompile()
        return forward, backward

    def uuid(self) -> Any:
        """What this partitioner does, options included: a cached graph of another one is none of this one's."""
        assert get_hash_for_files is not None
        files = tuple(
            str(Path(__file__).parent / name) for name in ("inductor.py", "codecs/rows.py", "codecs/packing.py", "fusion.py")
        )
        return get_hash_for_files(files, repr(self.codec)), torch.__version__

    def _code(self, forward: fx.Graph, backward: fx.Graph, node: fx.Node, reader: fx.Node) -> list[fx.Node]:
        """Pack `node` at the end of the forward, unpack it where the backward reads it; returns what is saved."""
        value = node.meta["val"]
        with value.fake_mode:
            codes, ranges, *rest = self.codec.pack(value)
            packing = make_fx(lambda x: self.codec.pack(x)[:2])(value)
            unpacking = make_fx(lambda codes, ranges: self.codec.unpack((codes, ranges, *rest)))(codes, ranges)
        packed = _spliced(forward, packing.graph, [node], forward.output_node())
        given = []
        for made in packed:
            if "saved_tensor_with_no_vc_check" in node.meta:  # AOTAutograd counts these by their mark
                made.meta["saved_tensor_with_no_vc_check"] = node.meta["saved_tensor_with_no_vc_check"]
            with backward.inserting_before(reader):
                given.append(backward.placeholder(made.name))
            given[-1].meta["val"] = made.meta["val"]
        first = next(n for n in backward.nodes if n.op != "placeholder")
        (restored,) = _spliced(backward, unpacking.graph, given, first)
        reader.replace_all_uses_with(restored)
        backward.erase_node(reader)
        return packed


def _spliced(graph: fx.Graph, part: fx.Graph, arguments: list[fx.Node], before: fx.Node) -> list[fx.Node]:
    """Copy a part into a graph, before a node; returns what the part returns."""
    copies = dict(zip(part.find_nodes(op="placeholder"), arguments, strict=True))
    with graph.inserting_before(before):
        for node in part.nodes:
            if node.op not in ("placeholder", "output"):
                copies[node] = graph.node_copy(node, copies.__getitem__)
    results: Any = part.output_node().args[0]
    return [copies[node] for node in (results if isinstance(results, list | tuple) else (results,))]


def _is_static(value: torch.Tensor) -> bool:
    return all(isinstance(size, int) for size in (*value.shape, *value.stride()))


def _require(present: bool, what: str) -> None:
    if not present:
        raise InputError(
            f"torch {torch.__version__} has no {what}: take torch 2.11 or newer, or s2a_fx.transform, which needs none."
        )
