"""Which module a node comes from."""

import re

from torch import fx, nn

_READ = re.compile(r"getattr\(([^()]*), '([^']*)'\)")
_CHILD = re.compile(r"\.(?:__dict__\['_modules'\]|_modules)\['([^']*)'\]")
_BODY = re.compile(r".*\.(?:recomputed_branch|coded_input|checkpointed)(?:_\d+)?\.(?:backward_)?body\.")
"""The path of a part that is computed again, up to where the original model's own paths begin."""


def module_stack(node: fx.Node) -> list[tuple[str, type[nn.Module] | str]]:
    """The modules around a node, outermost first, as (path, type)."""
    return list(node.meta.get("nn_module_stack", {}).values())


def module_path(node: fx.Node) -> str:
    """The innermost module of a node; for a `call_module` node, the called one."""
    if node.op == "call_module":
        return str(node.target)
    stack = module_stack(node)
    return stack[-1][0] if stack else ""


def owner_stack(node: fx.Node) -> dict[str, tuple[str, type[nn.Module] | str]]:
    """The modules around the call of a node, outermost first; for a `call_module` node, without the called one."""
    stack = module_stack(node)
    if node.op == "call_module" and stack and stack[-1][0] == node.target:
        stack = stack[:-1]
    return {path: (path, kind) for path, kind in stack}


def owner_path(node: fx.Node) -> str:
    """The module whose forward emitted the node; for a `call_module` node, the caller."""
    return next(reversed(owner_stack(node)), "")


def plain_path(expression: str) -> str:
    """`getattr(L['self'].blocks, '0').norm1` -> `blocks.0.norm1`; of a part that is recomputed, the path of the original module."""
    while _READ.search(expression):
        expression = _READ.sub(r"\1.\2", expression)
    expression = _CHILD.sub(r".\1", expression)
    return _BODY.sub("", expression.removeprefix("L['self']").lstrip("."))
