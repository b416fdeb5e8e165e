"""Activations as formulas, such as `x * torch.sigmoid(x)`: elementwise functions of one value.

A formula is one expression, or a run of statements that bind names to parts of the formula.
"""

import ast
import math
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ...activations import FUNCTION_NAMES
from ..code.code_objects import has_type
from ..code.scope import UNKNOWN, Scope
from ..code.straight_line import Binding, Half

_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)

# The functions in formulas: of one tensor, without in-place writes and random numbers.
_PURE = FUNCTION_NAMES.union("add div erf mul neg pow square sub".split())
# The name of the value in the text of a formula.
VALUE = "ckpt_value"
_PURE_FUNCTIONS = frozenset(
    [getattr(module, name) for module in (torch, F, torch.special) for name in _PURE if hasattr(module, name)]
    + [function for function in vars(math).values() if isinstance(function, types.BuiltinFunctionType)]
)


class Formula(NamedTuple):
    """A formula of VALUE.

    `text` is the formula as source text; `values` are the nodes that the value has in the original, `functions` the
    nodes of functions and numbers that the formula names, and `names` the ids of the nodes of names that were replaced
    by their bindings.
    """

    text: str
    values: list[ast.expr]
    functions: list[ast.expr]
    names: set[int]


def formula_of(tree: ast.AST, scope: Scope, bindings: Mapping[int, Binding]) -> Formula | None:
    """An expression as a formula of one value, which is a local name, or any expression that occurs once.

    `bindings` replace names, by the ids of their nodes. None if the expression is no such formula.
    """
    parser = _FormulaParser(scope, bindings)
    formula = parser.formula(tree)
    values = parser.values
    if formula is None or not values or isinstance(formula, ast.Name):
        return None
    first = values[0]
    name = first.id if isinstance(first, ast.Name) and first.id in scope.private_locals else None
    if not all(value is first or (name is not None and getattr(value, "id", None) == name) for value in values):
        return None
    return Formula(ast.unparse(formula), values, parser.functions, parser.names)


class _FormulaParser:
    def __init__(self, scope: Scope, bindings: Mapping[int, Binding]) -> None:
        self._scope = scope
        self._bindings = bindings
        self.values: list[ast.expr] = []
        self.functions: list[ast.expr] = []
        self.names: set[int] = set()

    def formula(self, tree: Any) -> ast.expr | None:
        """The formula of an expression; a subexpression of any other kind is taken as the value."""
        binding = self._bindings.get(id(tree))
        if binding is not None and not isinstance(binding, Half):
            self.names.add(id(tree))
            return self.formula(binding)
        if isinstance(tree, ast.Constant):
            return tree if type(tree.value) in (int, float, str, bool) else None
        if isinstance(tree, ast.BinOp):
            left, right = self.formula(tree.left), self.formula(tree.right)
            is_arithmetic = isinstance(tree.op, ast.Add | ast.Sub | ast.Mult | ast.Div | ast.Pow)
            return ast.BinOp(left, tree.op, right) if is_arithmetic and left is not None and right is not None else None
        if isinstance(tree, ast.UnaryOp):
            operand = self.formula(tree.operand)
            return ast.UnaryOp(tree.op, operand) if isinstance(tree.op, ast.USub) and operand is not None else None
        value = self._scope.value(tree)
        if type(value) in (int, float):
            self.functions.append(tree)
            return tree
        if isinstance(tree, ast.Call) and self._is_pure(tree.func):
            return self._call(tree)
        if isinstance(tree, ast.Starred):
            return None
        self.values.append(tree)
        return ast.Name(VALUE, ast.Load())

    def _call(self, tree: ast.Call) -> ast.expr | None:
        callee: Any = tree.func
        if self._scope.value(callee) is UNKNOWN:
            subject: Any = self.formula(callee.value)
            callee = ast.Attribute(subject, callee.attr, ast.Load())
        else:
            self.functions.append(callee)
            subject = callee
        arguments: list[Any] = [self.formula(a) for a in tree.args]
        keywords: list[Any] = [(k.arg, self.formula(k.value)) for k in tree.keywords]
        writes = any(k.arg == "inplace" and getattr(k.value, "value", True) is not False for k in tree.keywords)
        if writes or subject is None or None in arguments or any(None in pair for pair in keywords):
            return None
        return ast.Call(callee, arguments, [ast.keyword(*pair) for pair in keywords])

    def _is_pure(self, callee: ast.expr) -> bool:
        value = self._scope.value(callee)
        if value is not UNKNOWN:
            return has_type(value, _FUNCTIONS) and value in _PURE_FUNCTIONS
        return isinstance(callee, ast.Attribute) and callee.attr in _PURE
