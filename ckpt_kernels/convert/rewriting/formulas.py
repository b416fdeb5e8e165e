"""Activations that are written out: functions of one value, of torch's and Python's arithmetic, in one expression or
over the names that a run of statements makes."""

import ast
import math
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..code.flow import Half, Meaning
from ..code.scope import UNKNOWN, Scope

_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)

# What a formula may be made of: functions of one tensor that write to nothing and draw nothing.
_PURE = """add div elu erf gelu hardswish hardtanh leaky_relu mish mul neg pow relu relu6 sigmoid silu softplus square
    sub tanh""".split()
# The value in a formula.
VALUE = "ckpt_value"
_PURE_FUNCTIONS = frozenset(
    [getattr(module, name) for module in (torch, F, torch.special) for name in _PURE if hasattr(module, name)]
    + [function for function in vars(math).values() if isinstance(function, types.BuiltinFunctionType)]
)


class Formula(NamedTuple):
    """A formula of VALUE, as text; the places where the value stands; the functions and numbers that it names; and the
    names that were looked through, by the ids of their nodes."""

    text: str
    values: list[ast.expr]
    functions: list[ast.expr]
    names: set[int]


def formula_of(tree: ast.AST, scope: Scope, meanings: Mapping[int, Meaning]) -> Formula | None:
    """An expression as a formula of one value, which is one expression that is evaluated once, or one local name.

    `meanings`: what names are looked through for.
    """
    reading = _Reading(scope, meanings)
    formula = reading.formula(tree)
    values = reading.values
    if formula is None or not values or isinstance(formula, ast.Name):
        return None
    first = values[0]
    name = first.id if isinstance(first, ast.Name) and first.id in scope.fast else None
    if not all(value is first or (name is not None and getattr(value, "id", None) == name) for value in values):
        return None
    return Formula(ast.unparse(formula), values, reading.functions, reading.names)


class _Reading:
    def __init__(self, scope: Scope, meanings: Mapping[int, Meaning]) -> None:
        self._scope = scope
        self._meanings = meanings
        self.values: list[ast.expr] = []
        self.functions: list[ast.expr] = []
        self.names: set[int] = set()

    def formula(self, tree: Any) -> ast.expr | None:
        """The formula of an expression; whatever is none is the value."""
        meaning = self._meanings.get(id(tree))
        if meaning is not None and not isinstance(meaning, Half):
            self.names.add(id(tree))
            return self.formula(meaning)
        if isinstance(tree, ast.Constant):
            return tree if type(tree.value) in (int, float, str, bool) else None
        if isinstance(tree, ast.BinOp):
            left, right = self.formula(tree.left), self.formula(tree.right)
            pure = isinstance(tree.op, ast.Add | ast.Sub | ast.Mult | ast.Div | ast.Pow)
            return ast.BinOp(left, tree.op, right) if pure and left is not None and right is not None else None
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
            return isinstance(value, _FUNCTIONS) and value in _PURE_FUNCTIONS
        return isinstance(callee, ast.Attribute) and callee.attr in _PURE
