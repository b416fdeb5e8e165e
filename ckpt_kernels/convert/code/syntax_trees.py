"""Trees of statements and expressions: copies of them with other parts, and what they are."""

import ast
import copy
from collections.abc import Iterator, Mapping
from typing import Any


def at(place: ast.AST, tree: ast.expr) -> ast.expr:
    """The tree, all that is new in it at that place of the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.expr | ast.keyword) and not hasattr(node, "lineno"):
            ast.copy_location(node, place)
    return tree


def with_parts(tree: ast.AST, change: Any) -> ast.AST:
    """A copy of the node, each of its parts changed."""
    made = copy.copy(tree)
    for name, value in ast.iter_fields(tree):
        if isinstance(value, ast.AST | list):
            setattr(made, name, change(value))
    return made


def replaced(tree: Any, instead: Mapping[int, ast.expr]) -> Any:
    """A copy of the tree with other expressions in the place of those with these ids."""
    if isinstance(tree, list):
        return [replaced(part, instead) for part in tree]
    if not isinstance(tree, ast.AST):
        return tree
    if id(tree) in instead:
        return at(tree, instead[id(tree)])
    return with_parts(tree, lambda part: replaced(part, instead))


def expressions_in(tree: ast.AST) -> Iterator[ast.expr]:
    """The expressions in a tree, from the outermost, that a pattern may begin with."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call | ast.BinOp):
            yield node


def assigns(statement: ast.stmt, name: str) -> bool:
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return False
    target = statement.targets[0]
    return isinstance(target, ast.Name) and target.id == name


def copies(statement: ast.stmt, name: str) -> bool:
    """Another name for what has that name."""
    if not isinstance(statement, ast.Assign) or not isinstance(statement.value, ast.Name):
        return False
    targets = [target.id for target in statement.targets if isinstance(target, ast.Name)]
    return statement.value.id == name and len(targets) == len(statement.targets) and name not in targets
