"""What a residual block is, and what it adds."""

from dataclasses import dataclass

from torch import fx


@dataclass(frozen=True)
class Block:
    """A residual block: its name, the node it is entered with, its nodes in order, and its output node.

    The name is a module's path: of the block, or of the innermost module around its layers; else the name of the addition.
    """

    path: str
    entry: fx.Node
    nodes: tuple[fx.Node, ...]
    output: fx.Node


@dataclass(frozen=True)
class Branch:
    """What a residual block adds to its input: the block's path, the `value` that is added, and the node that adds it."""

    path: str
    value: fx.Node
    add: fx.Node
