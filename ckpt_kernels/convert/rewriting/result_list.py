"""The list that a guarded call in a rewritten method returns: the results, and last whether there are any.

Each use pops an item off the list, so that no name holds a tensor longer than in the original method.
"""

import ast

from ..code.frames import PREFIX

_RESULTS = f"{PREFIX}results"


def condition_of(call: ast.Call) -> ast.expr:
    """An expression that binds the results of a guarded call, and pops the last: whether the call has computed."""
    named = ast.NamedExpr(ast.Name(_RESULTS, ast.Store()), call)
    return ast.Call(ast.Attribute(named, "pop", ast.Load()), [], [])


def next_result() -> ast.expr:
    """An expression that pops the next result."""
    return ast.Call(ast.Attribute(ast.Name(_RESULTS, ast.Load()), "pop", ast.Load()), [], [])
