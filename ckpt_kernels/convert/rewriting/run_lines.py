"""The lines of a fused call, by which debuggers stop once a line, in the order of the file.

The fused call and all plain loads for the call have the line of the expression that is evaluated first. A line without
code of its own, because the fused call computes all of it, has an instruction that does nothing.
"""

import ast
import copy
from collections.abc import Iterable
from typing import TypeVar

Node = TypeVar("Node", ast.Pass, ast.Constant, ast.IfExp)


def lines_without_code(original: Iterable[ast.AST], *code: ast.AST) -> list[int]:
    """The lines of the original nodes on which none of the new nodes has code."""
    return sorted(_lines_of(original) - _lines_of(code))


def _lines_of(trees: Iterable[ast.AST]) -> set[int]:
    return {node.lineno for tree in trees for node in ast.walk(tree) if isinstance(node, ast.expr | ast.stmt)}


def passed(lines: list[int], last: ast.stmt) -> list[ast.stmt]:
    """A `pass` on each line, before the statement `last`, which may extend over some of the lines."""
    lines = sorted({*lines, *(last.lineno for line in lines[-1:] if line > last.lineno)})
    return [_at_line(ast.Pass(), line) for line in lines]


def after_lines(lines: list[int], value: ast.expr) -> ast.expr:
    """An expression with the value, before which instructions on these lines do nothing."""
    for line in reversed(lines):
        always, never = _at_line(ast.Constant(True), line), _at_line(ast.Constant(None), line)
        value = _at_line(ast.IfExp(always, value, never), line)
    return value


def _at_line(node: Node, line: int) -> Node:
    node.lineno = node.end_lineno = line
    node.col_offset = node.end_col_offset = 0
    return node


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
