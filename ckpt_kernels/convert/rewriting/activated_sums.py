"""Methods that activate a sum, such as `relu(y + shortcut)`, in whatever form.

Torch saves only the output of some activations. To recompute that output from the operands of the sum takes a proof
that nobody wrote to the sum before the activation: the sum is watched.
"""

import ast
import types
from collections.abc import Collection

from ..code.code_objects import names_in
from ..code.memoization import memoized
from ..code.source import definition_of
from ..code.syntax_trees import is_name
from .roles import Roles

# Methods of tensors, and functions of torch, that are activations.
_METHODS = frozenset(("relu", "relu_"))
_KINDS = ("act", "write")


def activates_sums(function: types.FunctionType, roles: Roles) -> bool:
    """Whether a function applies an activation, by these roles or a method of tensors, to a sum that it computes."""
    callees = frozenset(text for text, role in roles.items() if role.kind in _KINDS)
    names = names_in(function.__code__)
    return bool(callees or not _METHODS.isdisjoint(names)) and _activates_sums(function, callees)


def calls_activation_of_sum(function: types.FunctionType) -> bool:
    """Whether a function calls such a method of a sum."""
    return not _METHODS.isdisjoint(names_in(function.__code__)) and _activates_sums(function, frozenset())


@memoized
def _activates_sums(function: types.FunctionType, callees: frozenset[str]) -> bool:
    nodes = list(ast.walk(definition_of(function).tree))
    sums = {
        target.id
        for node in nodes
        if isinstance(node, ast.Assign) and _is_sum(node.value)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    inputs = (_activated(node, callees) for node in nodes if isinstance(node, ast.Call))
    return any(input is not None and (_is_sum(input) or is_name(input, sums)) for input in inputs)


def _activated(call: ast.Call, callees: Collection[str]) -> ast.expr | None:
    """The input of an activation; None for other calls."""
    if isinstance(call.func, ast.Attribute) and call.func.attr in _METHODS:
        return call.args[0] if call.args else call.func.value
    is_activation = isinstance(call.func, ast.Name | ast.Attribute | ast.Subscript) and bool(call.args)
    return call.args[0] if is_activation and ast.unparse(call.func) in callees else None


def _is_sum(tree: ast.expr) -> bool:
    if isinstance(tree, ast.Call):
        return isinstance(tree.func, ast.Attribute) and tree.func.attr == "add"
    return isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add)
