"""Runs of statements that compute a gate of the halves of one tensor, such as those in the experts of GPT-OSS.

A run takes halves of a local name, binds further names, and ends with the statement that binds or returns the gate. The
run is tried out as a method of the module and the tensor (see `rules.gates`).
"""

import ast
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from ..code.memoization import memoized
from ..code.scope import Scope
from ..code.source import definition_of, set_tree
from ..code.straight_line import OPAQUE, Block, blocks, bound_names, is_dead
from ..rules.gates import TriedGate, clamps_or_casts, gate_of_method, outline_of_method
from .roles import GATE_RUN, Role, Roles

# The largest number of statements in a run.
_MAX_LENGTH = 10


class GateRun(NamedTuple):
    """The statements `begin` to `end`, both included, of a block, which read the local name `packed`.

    `text` is the run as a method of the module and the tensor.
    """

    begin: int
    end: int
    packed: str
    text: str


def gate_runs(function: ast.FunctionDef, block: Block, scope: Scope) -> Iterator[GateRun]:
    """The runs in a block that may be gates, longer ones first."""
    statements = block.statements
    for end in range(len(statements)):
        for begin in range(max(0, end - _MAX_LENGTH + 1), end):
            run = _run_between(function, block, begin, end, scope)
            if run is not None:
                yield run


def _run_between(function: ast.FunctionDef, block: Block, begin: int, end: int, scope: Scope) -> GateRun | None:
    """The run from `begin` to `end`; None if the statements read more than one local name, or bind names that are read
    later."""
    *run, last = block.statements[begin : end + 1]
    result = _result_of(last)
    if result is None or not scope.self_name:
        return None
    if any(isinstance(node, OPAQUE) for statement in (*run, last) for node in ast.walk(statement)):
        return None
    bound: set[str] = set()
    free: set[str] = set()
    for statement in run:
        names = bound_names(statement)
        if not isinstance(statement, ast.Assign) or not names:
            return None
        free |= _loaded(statement.value, scope) - bound
        bound.update(names)
    free |= _loaded(result, scope) - bound
    free.discard(scope.self_name)
    if len(free) != 1 or scope.self_name in bound or not free.isdisjoint(bound):
        return None
    if not scope.private_locals.issuperset(free | bound):
        return None
    if not all(is_dead(name, function, block, begin, end) for name in bound):
        return None
    (packed,) = free
    lines = [f"def run({scope.self_name}, {packed}):", *map(ast.unparse, run), f"return {ast.unparse(result)}"]
    return GateRun(begin, end, packed, "\n    ".join(lines))


def _result_of(statement: ast.stmt) -> ast.expr | None:
    """The value that a statement returns or binds to one name; None for other statements."""
    if isinstance(statement, ast.Return):
        return statement.value
    return statement.value if isinstance(statement, ast.Assign) and len(bound_names(statement)) == 1 else None


def _loaded(tree: ast.expr, scope: Scope) -> set[str]:
    """The local names in an expression."""
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} & scope.locals


@memoized
def _run_methods(function: types.FunctionType) -> dict[str, types.FunctionType]:
    """The runs in a function that may be gates, by their text."""
    if not clamps_or_casts(function):
        return {}
    tree = definition_of(function).tree
    scope = Scope(function, tree)
    runs = (run for block in blocks(tree) for run in gate_runs(tree, block, scope))
    return {run.text: _run_method(function, run.text) for run in runs}


def _run_method(function: types.FunctionType, text: str) -> types.FunctionType:
    module: Any = ast.parse(text)
    (code,) = [c for c in compile(module, "<run>", "exec").co_consts if isinstance(c, types.CodeType)]
    method = types.FunctionType(code, function.__globals__)
    # `memoized` decides by these names.
    method.__module__, method.__qualname__ = function.__module__, f"{function.__qualname__}.run"
    set_tree(method, module.body[0])
    return method


def gate_run_roles(module: nn.Module, function: types.FunctionType) -> dict[str, Role]:
    """The roles of the runs that are gates, by their text."""
    outlines = {text: outline_of_method(module, method) for text, method in _run_methods(function).items()}
    return {text: Role(GATE_RUN, values=(type(module), o)) for text, o in outlines.items() if o is not None}


def gate_of_run(function: types.FunctionType, run: GateRun, roles: Roles) -> TriedGate | None:
    """The gate that a run computes, by the run's role; None without one."""
    role = roles.get(run.text, Role())
    if role.kind != GATE_RUN or run.text not in (methods := _run_methods(function)):
        return None
    kind, outline = role.values
    return gate_of_method(kind, methods[run.text], outline)
