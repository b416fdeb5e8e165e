"""Helpers for syntax trees: copies with replaced nodes, and simple questions about statements."""

import ast
import copy
from collections.abc import Iterator, Mapping
from typing import Any


def at(location: ast.AST, tree: ast.expr) -> ast.expr:
    """Give all new nodes of a tree the location of another node in the file; returns the tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.expr | ast.keyword) and not hasattr(node, "lineno"):
            ast.copy_location(node, location)
    return tree


def with_changed_children(tree: ast.AST, change: Any) -> ast.AST:
    """A copy of the node with `change` applied to all children and lists of children."""
    copied = copy.copy(tree)
    for name, value in ast.iter_fields(tree):
        if isinstance(value, ast.AST | list):
            setattr(copied, name, change(value))
    return copied


def replaced(tree: Any, replacements: Mapping[int, ast.expr]) -> Any:
    """A copy of the tree in which `replacements`, by the ids of nodes, take the place of these nodes."""
    if isinstance(tree, list):
        return [replaced(child, replacements) for child in tree]
    if not isinstance(tree, ast.AST):
        return tree
    if id(tree) in replacements:
        return at(tree, replacements[id(tree)])
    return with_changed_children(tree, lambda child: replaced(child, replacements))


def expressions_in(tree: ast.AST) -> Iterator[ast.expr]:
    """The expressions in a tree that may be the root of a pattern, outermost first."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call | ast.BinOp):
            yield node


def assigns(statement: ast.stmt, name: str) -> bool:
    """Whether a statement is `name = ...`."""
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return False
    target = statement.targets[0]
    return isinstance(target, ast.Name) and target.id == name


def copies(statement: ast.stmt, name: str) -> bool:
    """Whether a statement only copies a name to other names: `other = name`."""
    if not isinstance(statement, ast.Assign) or not isinstance(statement.value, ast.Name):
        return False
    targets = [target.id for target in statement.targets if isinstance(target, ast.Name)]
    return statement.value.id == name and len(targets) == len(statement.targets) and name not in targets
