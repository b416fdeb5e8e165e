"""An activation after branches that end with a norm moves into the branches, so that a pattern finds both in a row.

    if a: x = f(x)                  if a: x = f(x); x = act(x)
    else: x = norm(x)        ->     else: x = norm(x); x = act(x)
    x = act(x)

Each path runs the same statements in the same order as before.
"""

import ast
import copy
from collections.abc import Iterator

from ..code.straight_line import blocks
from ..code.syntax_trees import is_name
from .roles import Role, Roles


def move_into_branches(function: ast.FunctionDef, roles: Roles) -> None:
    """Moves such activations, in place."""
    for block in list(blocks(function)):
        statements = block.statements
        for index in range(len(statements) - 1, 0, -1):
            branched, last = statements[index - 1 : index + 1]
            name = _rebound_by(last, "act", roles)
            if not name or not isinstance(branched, ast.If):
                continue
            branches = list(_branches(branched))
            if any(branch and _rebound_by(branch[-1], "norm", roles) == name for branch in branches):
                for branch in branches:
                    branch.append(copy.deepcopy(last))
                del statements[index]


def _rebound_by(statement: ast.stmt, kind: str, roles: Roles) -> str:
    """The name in `name = callee(name)`, for a callee whose role is of that kind; "" for other statements."""
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return ""
    target, call = statement.targets[0], statement.value
    if not isinstance(target, ast.Name) or not isinstance(call, ast.Call) or len(call.args) != 1 or call.keywords:
        return ""
    is_rebound = is_name(call.args[0], (target.id,))
    return target.id if is_rebound and roles.get(ast.unparse(call.func), Role()).kind == kind else ""


def _branches(branched: ast.If) -> Iterator[list[ast.stmt]]:
    """The statements of each branch, that of a missing `else` included."""
    yield branched.body
    if len(branched.orelse) == 1 and isinstance(branched.orelse[0], ast.If):
        yield from _branches(branched.orelse[0])
    else:
        yield branched.orelse
