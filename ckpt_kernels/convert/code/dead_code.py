"""Code of a function that does not run: what stands under `if is_installed():`, where that returns a flag of its file.

Where the flag is False it need not be read, as long as the flag stays what it is.
"""

import ast
import copy
import types
from typing import Any

from .source import NoSource, definition_of, rebuilt

# What holds something, under which name, and what.
_Found = tuple[Any, str, Any]


def live_code(function: types.FunctionType) -> tuple[types.CodeType, list[_Found]]:
    """The code without what does not run, and what has to stay as it is for that."""
    names = function.__globals__
    held: list[_Found] = []
    absent = set()
    code = function.__code__
    local = {*code.co_varnames, *code.co_cellvars, *code.co_freevars}
    for name in code.co_names:
        if name not in local and name in names and (flag := _flag_returned(names[name])) is not None:
            absent.add(name)
            held += [(names, name, names[name]), (names[name], "__code__", names[name].__code__), flag]
    if not absent:
        return function.__code__, []
    try:
        definition = definition_of(function)
        tree = _Living(absent).visit(copy.deepcopy(definition.tree))
        return rebuilt(function, definition._replace(tree=tree), {}).__code__, held
    except NoSource:
        return function.__code__, []


def _flag_returned(function: Any) -> _Found | None:
    """The flag of its file that a function without arguments returns, if that is False."""
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


class _Living(ast.NodeTransformer):
    def __init__(self, absent: set[str]) -> None:
        self._absent = absent

    def visit_If(self, node: ast.If) -> Any:
        self.generic_visit(node)
        test = node.test
        if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
            test = test.values[0]
        if isinstance(test, ast.Call) and not test.args and not test.keywords and isinstance(test.func, ast.Name):
            if test.func.id in self._absent:
                return node.orelse or ast.copy_location(ast.Pass(), node)
        return node
