"""Helpers for syntax trees: copies with replaced nodes, and simple questions about statements."""

import ast
import copy
import functools
from collections.abc import Container, Iterator, Mapping
from typing import Any, TypeGuard


def at(location: ast.AST, tree: ast.expr) -> ast.expr:
    """Give all new nodes of a tree the location of another node in the file; returns the tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.expr | ast.keyword) and not hasattr(node, "lineno"):
            ast.copy_location(node, location)
            # Python's compiler gives the load of a method the line where the attribute ends, not where it begins.
            if isinstance(node, ast.Attribute):
                node.end_lineno, node.end_col_offset = node.lineno, node.col_offset
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


def is_name(tree: ast.AST, names: Container[str]) -> TypeGuard[ast.Name]:
    """Whether a node is one of these names."""
    return isinstance(tree, ast.Name) and tree.id in names


def root_name(tree: ast.AST) -> str:
    """The name that a chain of attributes, subscripts and calls begins with, or ""."""
    while isinstance(tree, ast.Attribute | ast.Subscript | ast.Call):
        tree = tree.func if isinstance(tree, ast.Call) else tree.value
    return tree.id if isinstance(tree, ast.Name) else ""


@functools.lru_cache(maxsize=1024)
def stored_names(tree: ast.FunctionDef) -> frozenset[str]:
    """The names that are bound or deleted in a function."""
    names = (node for node in ast.walk(tree) if isinstance(node, ast.Name))
    return frozenset(name.id for name in names if not isinstance(name.ctx, ast.Load))


def index_parts(tree: ast.Subscript) -> list[ast.expr]:
    """The parts of an index: one for each item of a tuple."""
    return tree.slice.elts if isinstance(tree.slice, ast.Tuple) else [tree.slice]


def keeps_dimensions(index: ast.AST) -> bool:
    """Whether an index is None, `:` or `...`, which make a view of all of a tensor."""
    if isinstance(index, ast.Slice):
        return index.lower is index.upper is index.step is None
    return isinstance(index, ast.Constant) and index.value in (None, ...)


def assigns(statement: ast.stmt, name: str) -> bool:
    """Whether a statement is `name = ...`."""
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return False
    return is_name(statement.targets[0], (name,))


def copies(statement: ast.stmt, name: str) -> bool:
    """Whether a statement only copies a name to other names: `other = name`."""
    if not isinstance(statement, ast.Assign) or not is_name(statement.value, (name,)):
        return False
    return all(isinstance(target, ast.Name) and target.id != name for target in statement.targets)
