"""Dead code of a function: branches under `if is_installed():`, where the function returns a global that is False, and
under `if x.device.type == "mps":`, where x is an argument.

Such a branch need not be analysed: as long as the global and the function keep their values, or because fused functions
take only tensors on a CPU or a CUDA device.
"""

import ast
import copy
import types
from typing import Any

from ..native_guards import Binding
from .source import NoSource, definition_of, rebuilt, tree_of
from .syntax_trees import is_name


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
    # The first of several arguments may be a module.
    arguments = code.co_varnames[: code.co_argcount]
    tensors = set(arguments[1:] or arguments) if {"device", "type"} <= set(code.co_names) else set()
    if not false_functions and not tensors:
        return function.__code__, []
    try:
        definition = definition_of(function)
        tensors -= {n.id for n in ast.walk(definition.tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        remover = _DeadBranchRemover(false_functions, tensors)
        if not any(isinstance(node, ast.If) and remover.is_dead(node.test) for node in ast.walk(definition.tree)):
            return function.__code__, []
        tree = remover.visit(copy.deepcopy(definition.tree))
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
    tree = tree_of(function)
    returned = tree.body[0] if tree is not None and len(tree.body) == 1 else None
    is_flag = isinstance(returned, ast.Return) and returned.value is not None and is_name(returned.value, (name,))
    return (function.__globals__, name, False) if is_flag else None


class _DeadBranchRemover(ast.NodeTransformer):
    def __init__(self, false_functions: set[str], tensors: set[str]) -> None:
        self._false_functions = false_functions
        self._tensors = tensors

    def visit_If(self, node: ast.If) -> Any:
        self.generic_visit(node)
        return (node.orelse or ast.copy_location(ast.Pass(), node)) if self.is_dead(node.test) else node

    def is_dead(self, test: ast.expr) -> bool:
        """Whether a condition, or the first of several that all must hold, is false."""
        if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
            test = test.values[0]
        return self._is_false_call(test) or self._names_other_device(test)

    def _is_false_call(self, test: ast.expr) -> bool:
        if not isinstance(test, ast.Call) or test.args or test.keywords or not isinstance(test.func, ast.Name):
            return False
        return test.func.id in self._false_functions

    def _names_other_device(self, test: ast.expr) -> bool:
        """Whether an expression asks for another device of an argument than a CPU or a CUDA device."""
        if not isinstance(test, ast.Compare) or not isinstance(test.left, ast.Attribute):
            return False
        owner, _, asked = ast.unparse(test.left).partition(".")
        name = test.comparators[0].value if isinstance(test.comparators[0], ast.Constant) else None
        is_question = len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq) and asked == "device.type"
        return is_question and owner in self._tensors and isinstance(name, str) and name not in ("cpu", "cuda")
