"""The lines of a fused run of statements, by which debuggers stop once a line, in the order of the file.

The fused call and all that it loads have the line of the run's first statement. Each of the other statements keeps a
line: its own code if the original runs, a `pass` if the fused call computes the statement.
"""

import ast
import copy
from collections.abc import Iterable


def passed(statements: Iterable[ast.stmt]) -> list[ast.stmt]:
    """A `pass` on the line of each statement."""
    return [ast.copy_location(ast.Pass(), statement) for statement in statements]


def loaded_early(load: ast.expr, location: ast.expr, load_attribute: ast.expr) -> ast.expr:
    """A plain load as an expression at another location.

    `load_attribute` evaluates to `getattr`, by which a missing attribute is None: the error is raised on the line of
    the original load.
    """
    if isinstance(load, ast.Attribute) and not load.attr.startswith("__"):  # a class mangles such names
        value = loaded_early(load.value, location, load_attribute)
        arguments = [value, ast.Constant(load.attr), ast.Constant(None)]
        return ast.copy_location(ast.Call(load_attribute, arguments, []), location)
    load = copy.deepcopy(load)
    for node in ast.walk(load):
        if isinstance(node, ast.expr):
            ast.copy_location(node, location)
    return load
