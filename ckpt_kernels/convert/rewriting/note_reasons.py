"""Reasons to note a method's operators where nothing else in it is exchanged; without one the method stays."""

import ast
import types
from collections.abc import Iterator

from ..code.code_objects import names_in
from ..code.memoization import memoized
from ..code.source import definition_of
from .roles import MODULE, Role, Roles

# What is cut off is a gate, say, whose parts are kept one by one.
_CLAMPS = frozenset(("clamp", "clamp_min", "clamp_max"))

# What a method calls that makes, or reads, what runs again in a layer.
IN_LAYERS = frozenset(("linear", "norm", MODULE))

# Beside the loads of a method: that its sums are worth to be noted, and whose they are.
_NOTED = ""
ADAPTER = ((_NOTED, Role("noted", "an adapter's sum")),)
BIASED = ((_NOTED, Role("noted", "a linear layer's sum")),)
# Or that it picks heads, say, which are copied.
PICKING = ((_NOTED, Role("noted", "what is picked")),)


@memoized
def picks(function: types.FunctionType) -> bool:
    """Whether it takes parts of something by a list of numbers."""
    return any(is_indexed_by_list(node) for node in ast.walk(definition_of(function).tree))


def is_indexed_by_list(tree: ast.AST) -> bool:
    """Whether an expression is such a part, as `qkv[..., [-1], :]`."""
    if not isinstance(tree, ast.Subscript) or not isinstance(tree.ctx, ast.Load):
        return False
    return any(isinstance(part, ast.List) for part in getattr(tree.slice, "elts", [tree.slice]))


def reasons_to_note(function: types.FunctionType, loads: Roles, recompute: str, scales: bool) -> Iterator[str]:
    """The reasons, each a line of the report. The method `scales` if it multiplies."""
    kinds = {part.kind for part in loads.values()}
    if _CLAMPS & names_in(function.__code__):
        yield "recipes of what is clamped"
    if _NOTED in loads:
        yield f"recipes of {loads[_NOTED].name}"
    if scales and "norm" in kinds:
        yield "recipes of what is scaled"
    # Where products run again, sums that a norm reads can be made again too, and heads that are put together.
    if recompute == "layer" and not IN_LAYERS.isdisjoint(kinds):
        yield "recipes of sums, products and what is put together"
