"""Reasons to rewrite a method only to note operators for recompute; without a reason the method stays as written."""

import ast
import types
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ...levels import discards_outputs, runs_layers_again
from ..code.code_objects import names_in
from ..code.memoization import memoized
from ..code.source import definition_of
from .activated_sums import activates_sums
from .noted_operations import NOTED_CASTS
from .roles import MODULE, Role, Roles

# A clamped tensor may be a gate, whose operands are saved one by one.
_CLAMPS = frozenset(("clamp", "clamp_min", "clamp_max"))
_REDUCTIONS = frozenset(("mean", "norm", "std", "sum", "var"))

_CASTS = frozenset(NOTED_CASTS)
_ROW_NORMS = (F.layer_norm, F.rms_norm, torch.layer_norm, torch.rms_norm)
_PERMUTATIONS = frozenset(("movedim", "moveaxis", "permute", "swapaxes", "swapdims", "transpose"))

# Kinds of callees whose inputs or outputs the level "layer" recomputes.
IN_LAYERS = frozenset(("linear", "norm", MODULE))

# Roles without a load, beside those of a method's loads: the sums are worth a note, and whose sums they are.
_NOTED = ""
ADAPTER = ((_NOTED, Role("noted", "an adapter's sum")),)
BIASED = ((_NOTED, Role("noted", "a linear layer's sum")),)
# The method indexes by a list, perhaps to select heads, which copies.
_INDEXING = ((_NOTED, Role("noted", "indexed tensors")),)
# The method adds rows by index, as experts do: autograd saves the rows, which may be casts.
_ADDING = ((_NOTED, Role("noted", "rows that are added by index")),)
# The method activates a sum by a method of tensors.
_ACTIVATING = ((_NOTED, Role("noted", "activated sums")),)


def noted_roles(function: types.FunctionType, recompute: str) -> tuple[tuple[str, Role], ...]:
    """The role without a load that a function has by its code; () for most functions."""
    if not discards_outputs(recompute):
        return ()
    if adds_casts(function):
        return _ADDING
    if runs_layers_again(recompute) and indexes_by_list(function):
        return _INDEXING
    return _ACTIVATING if activates_sums(function, {}) else ()


def adds_casts(function: types.FunctionType) -> bool:
    """Whether a function names an addition by index, and casts."""
    names = names_in(function.__code__)
    return "to" in names and not names.isdisjoint(("index_add", "index_add_"))


def permutes_dimensions(function: types.FunctionType) -> bool:
    """Whether a function names a permutation of dimensions."""
    return not _PERMUTATIONS.isdisjoint(names_in(function.__code__))


def activates_permuted_norm(function: types.FunctionType, roles: Roles) -> bool:
    """Whether a function has a norm, permutes dimensions, and activates anything."""
    kinds = {role.kind for role in roles.values()}
    if kinds.isdisjoint(("act", "write")) or not permutes_dimensions(function):
        return False
    replaced = [value for role in roles.values() if role.kind == "replacement" for value in role.values]
    return "norm" in kinds or any(value is norm for value in replaced for norm in _ROW_NORMS)


@memoized
def indexes_by_list(function: types.FunctionType) -> bool:
    """Whether a function indexes anything by a list of numbers."""
    return any(is_indexed_by_list(node) for node in ast.walk(definition_of(function).tree))


def is_indexed_by_list(tree: ast.AST) -> bool:
    """Whether an expression is indexed by a list, such as `qkv[..., [-1], :]`."""
    if not isinstance(tree, ast.Subscript) or not isinstance(tree.ctx, ast.Load):
        return False
    return any(isinstance(part, ast.List) for part in getattr(tree.slice, "elts", [tree.slice]))


@memoized
def _squares(function: types.FunctionType) -> bool:
    """Whether a function squares a tensor, of which torch saves the root, and does not reduce the square."""
    if not _REDUCTIONS.isdisjoint(names_in(function.__code__)):
        return False
    return any(map(_is_square, ast.walk(definition_of(function).tree)))


def _is_square(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        return name == "square" or (name == "pow" and bool(node.args) and _is_two(node.args[-1]))
    if not isinstance(node, ast.BinOp):
        return False
    is_product = isinstance(node.op, ast.Mult) and ast.unparse(node.left) == ast.unparse(node.right)
    return is_product or (isinstance(node.op, ast.Pow) and _is_two(node.right))


def _is_two(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value == 2


def reasons_to_note(function: types.FunctionType, roles: Roles, recompute: str, multiplies: bool) -> Iterator[str]:
    """The reasons, each a line of the report. `multiplies`: whether the method has a product."""
    kinds = {role.kind for role in roles.values()}
    if _CLAMPS & names_in(function.__code__):
        yield "recipes of clamped tensors"
    if _NOTED in roles:
        yield f"recipes of {roles[_NOTED].name}"
    elif activates_sums(function, roles):
        yield "recipes of activated sums"
    if multiplies and _squares(function):
        yield "recipes of scaled squares"
    if multiplies and "norm" in kinds:
        yield "recipes of products beside norms"
    if recompute == "all" and "act" in kinds and _CASTS & names_in(function.__code__):
        yield "recipes of activations of casts"
    # Where linear layers run again, sums that a norm reads and concatenated heads can be recomputed too.
    if runs_layers_again(recompute) and not IN_LAYERS.isdisjoint(kinds):
        yield "recipes of sums, products and concatenations"
