"""Where the results of a site are between its call and what takes them, in the code of a rewritten method: a list under
a name of ours, from which all is taken, so that no name holds a tensor longer than the original's would."""

import ast

from ..code.frames import PREFIX

_RESULTS = f"{PREFIX}results"


def has_computed(call: ast.Call) -> ast.expr:
    """The call of a site, whose results get the name, and what comes last of these: whether it has computed."""
    named = ast.NamedExpr(ast.Name(_RESULTS, ast.Store()), call)
    return ast.Call(ast.Attribute(named, "pop", ast.Load()), [], [])


def taken() -> ast.expr:
    """The next of the results."""
    return ast.Call(ast.Attribute(ast.Name(_RESULTS, ast.Load()), "pop", ast.Load()), [], [])
