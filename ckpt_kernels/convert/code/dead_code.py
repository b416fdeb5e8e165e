"""Dead code of a function: branches under `if is_installed():`, where the function returns a global that is False.

Such a branch need not be analysed as long as the global and the function keep their values.
"""

import ast
import copy
import types
from typing import Any

from ..native_guards import Binding
from .source import NoSource, definition_of, rebuilt


def live_code(function: types.FunctionType) -> tuple[types.CodeType, list[Binding]]:
    """The code of a function without its dead branches, and the (holder, name, value) triples that keep them dead."""
    names = function.__globals__
    assumptions: list[Binding] = []
    false_functions = set()
    code = function.__code__
    local = {*code.co_varnames, *code.co_cellvars, *code.co_freevars}
    for name in code.co_names:
        if name not in local and name in names and (flag := _false_flag(names[name])) is not None:
            false_functions.add(name)
            assumptions += [(names, name, names[name]), (names[name], "__code__", names[name].__code__), flag]
    if not false_functions:
        return function.__code__, []
    try:
        definition = definition_of(function)
        tree = _DeadBranchRemover(false_functions).visit(copy.deepcopy(definition.tree))
        return rebuilt(function, definition._replace(tree=tree), {}).__code__, assumptions
    except NoSource:
        return function.__code__, []


def _false_flag(function: Any) -> Binding | None:
    """The global flag that a function without arguments returns, if the flag is False."""
    if type(function) is not types.FunctionType or len(function.__code__.co_names) != 1:
        return None
    (name,) = function.__code__.co_names
    if function.__code__.co_argcount or function.__closure__ or function.__globals__.get(name) is not False:
        return None
    try:
        body = definition_of(function).tree.body
    except NoSource:
        return None
    last = body[-1]
    is_flag = isinstance(last, ast.Return) and isinstance(last.value, ast.Name) and last.value.id == name
    return (function.__globals__, name, False) if is_flag and len(body) == 1 else None


class _DeadBranchRemover(ast.NodeTransformer):
    def __init__(self, false_functions: set[str]) -> None:
        self._false_functions = false_functions

    def visit_If(self, node: ast.If) -> Any:
        self.generic_visit(node)
        test = node.test
        if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
            test = test.values[0]
        if isinstance(test, ast.Call) and not test.args and not test.keywords and isinstance(test.func, ast.Name):
            if test.func.id in self._false_functions:
                return node.orelse or ast.copy_location(ast.Pass(), node)
        return node
