"""What the expressions of a method name: modules, functions and numbers, and the part that each can have in a pattern.

Only loads that run no code are followed: children and plain attributes of modules, globals, closures, attributes of
imported Python modules. Everything else is unknown.
"""

import ast
import builtins
import math
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .loads import MISSING, load

UNKNOWN = object()
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)

# What a formula may be made of: functions of one tensor that write to nothing and draw nothing.
_PURE = "add div elu erf gelu hardswish leaky_relu mish mul neg pow relu sigmoid silu softplus square sub tanh".split()
# The value in a formula.
VALUE = "ckpt_value"
_PURE_FUNCTIONS = frozenset(
    [getattr(module, name) for module in (torch, F, torch.special) for name in _PURE if hasattr(module, name)]
    + [function for function in vars(math).values() if isinstance(function, types.BuiltinFunctionType)]
)


class Scope:
    """The names of one function, of which the first argument is `module`, or unknown where that is None."""

    def __init__(self, function: types.FunctionType, tree: ast.FunctionDef, module: nn.Module | None = None) -> None:
        code = function.__code__
        self.locals = frozenset(code.co_varnames) | frozenset(code.co_cellvars)
        # What nested functions share with this one may change at any time.
        self.fast = frozenset(code.co_varnames) - frozenset(code.co_cellvars)
        self._closure = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
        self._globals = function.__globals__
        self._module = module
        arguments = [*tree.args.posonlyargs, *tree.args.args]
        stored = {
            node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)
        }
        first = arguments[0].arg if arguments else ""
        self.self = first if first in self.fast and first not in stored else ""

    def value(self, tree: ast.AST) -> Any:
        """What an expression stands for, if a load that runs nobody's code tells."""
        if isinstance(tree, ast.Name):
            return self._name(tree.id)
        if isinstance(tree, ast.Attribute):
            return _attribute(self.value(tree.value), tree.attr)
        if isinstance(tree, ast.Subscript) and isinstance(tree.slice, ast.Constant):
            return _item(self.value(tree.value), tree.slice.value)
        return UNKNOWN

    def _name(self, name: str) -> Any:
        if name == self.self and self._module is not None:
            return self._module
        if name in self.locals:
            return UNKNOWN
        if name in self._closure:
            try:
                return self._closure[name].cell_contents
            except ValueError:
                return UNKNOWN
        return self._globals.get(name, vars(builtins).get(name, UNKNOWN))

    def pointwise(self, tree: ast.AST) -> "tuple[str, ast.expr, list[ast.expr]] | None":
        """A function of one value out of torch's and Python's arithmetic: its formula of VALUE, the value,
        and the functions and numbers that it names."""
        found: list[ast.expr] = []
        functions: list[ast.expr] = []
        formula = self._formula(tree, found, functions)
        if formula is None or not found or isinstance(formula, ast.Name):
            return None
        same = all(isinstance(v, ast.Name) and v.id in self.fast and v.id == getattr(found[0], "id", "") for v in found)
        return (ast.unparse(formula), found[0], functions) if same or len(found) == 1 else None

    def _formula(self, tree: Any, found: list[ast.expr], functions: list[ast.expr]) -> ast.expr | None:
        if isinstance(tree, ast.Constant):
            return tree if type(tree.value) in (int, float, str, bool) else None
        if isinstance(tree, ast.BinOp):
            left, right = (self._formula(side, found, functions) for side in (tree.left, tree.right))
            pure = isinstance(tree.op, ast.Add | ast.Sub | ast.Mult | ast.Div | ast.Pow)
            return ast.BinOp(left, tree.op, right) if pure and left is not None and right is not None else None
        if isinstance(tree, ast.UnaryOp):
            operand = self._formula(tree.operand, found, functions)
            return ast.UnaryOp(tree.op, operand) if isinstance(tree.op, ast.USub) and operand is not None else None
        value = self.value(tree)
        if type(value) in (int, float):
            functions.append(tree)
            return tree
        if isinstance(tree, ast.Call) and self._is_pure(tree.func):
            callee: Any = tree.func
            if self.value(callee) is UNKNOWN:
                subject: Any = self._formula(callee.value, found, functions)
                callee = ast.Attribute(subject, callee.attr, ast.Load())
            else:
                functions.append(callee)
                subject = callee
            arguments: list[Any] = [self._formula(a, found, functions) for a in tree.args]
            keywords: list[Any] = [(k.arg, self._formula(k.value, found, functions)) for k in tree.keywords]
            writes = any(k.arg == "inplace" and getattr(k.value, "value", True) is not False for k in tree.keywords)
            if writes or subject is None or None in arguments or any(None in pair for pair in keywords):
                return None
            return ast.Call(callee, arguments, [ast.keyword(*pair) for pair in keywords])
        if isinstance(tree, ast.Starred):
            return None
        found.append(tree)
        return ast.Name(VALUE, ast.Load())

    def _is_pure(self, callee: ast.expr) -> bool:
        value = self.value(callee)
        if value is not UNKNOWN:
            return isinstance(value, _FUNCTIONS) and value in _PURE_FUNCTIONS
        return isinstance(callee, ast.Attribute) and callee.attr in _PURE


def _attribute(owner: Any, name: str) -> Any:
    if isinstance(owner, types.ModuleType):
        return vars(owner).get(name, UNKNOWN)
    found = load(owner, name) if isinstance(owner, nn.Module) else MISSING
    return UNKNOWN if found is MISSING else found


def _item(owner: Any, index: Any) -> Any:
    lists = (nn.ModuleList, nn.Sequential)
    if type(index) is not int or not isinstance(owner, lists):
        return UNKNOWN
    if type(owner).__getitem__ not in [kind.__getitem__ for kind in lists]:
        return UNKNOWN
    held = list(owner._modules.values())
    return held[index] if -len(held) <= index < len(held) else UNKNOWN
