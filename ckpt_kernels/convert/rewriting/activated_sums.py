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
from .roles import Roles

# Methods of tensors, and functions of torch, that are activations.
_METHODS = frozenset(("relu", "relu_"))
_KINDS = ("act", "write")


def activates_sums(function: types.FunctionType, roles: Roles) -> bool:
    """Whether a function applies an activation, by these roles or a method of tensors, to a sum that it computes."""
    callees = frozenset(text for text, role in roles.items() if role.kind in _KINDS)
    names = names_in(function.__code__)
    return bool(callees or not _METHODS.isdisjoint(names)) and _activates_sums(function, callees)


@memoized
def _activates_sums(function: types.FunctionType, callees: frozenset[str]) -> bool:
    bound: dict[str, list[tuple[int, bool]]] = {}
    nodes = list(ast.walk(definition_of(function).tree))
    for node in nodes:
        if isinstance(node, ast.Assign | ast.AugAssign):
            for name in _names_bound_by(node):
                bound.setdefault(name, []).append((node.end_lineno or 0, _is_sum(node)))
    for call in nodes:
        input = _activated(call, callees) if isinstance(call, ast.Call) else None
        if isinstance(input, ast.Name):
            # The last statement above that binds the name.
            above = [binding for binding in bound.get(input.id, ()) if binding[0] < input.lineno]
            if above and max(above)[1]:
                return True
        elif input is not None and _is_sum(input):
            return True
    return False


def _names_bound_by(node: ast.Assign | ast.AugAssign) -> list[str]:
    """The names to which an assignment binds its value."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _activated(call: ast.Call, callees: Collection[str]) -> ast.expr | None:
    """The input of an activation; None for other calls."""
    if isinstance(call.func, ast.Attribute) and call.func.attr in _METHODS:
        return call.args[0] if call.args else call.func.value
    is_activation = isinstance(call.func, ast.Name | ast.Attribute | ast.Subscript) and bool(call.args)
    return call.args[0] if is_activation and ast.unparse(call.func) in callees else None


def _is_sum(tree: ast.AST) -> bool:
    """Whether an expression is a sum, or a statement binds one."""
    if isinstance(tree, ast.Assign):
        return _is_sum(tree.value)
    if isinstance(tree, ast.Call):
        return isinstance(tree.func, ast.Attribute) and tree.func.attr == "add"
    return isinstance(tree, ast.BinOp | ast.AugAssign) and isinstance(tree.op, ast.Add)
