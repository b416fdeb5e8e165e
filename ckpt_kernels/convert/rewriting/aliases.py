"""Aliases: local names that may stand for views of one tensor, and the check of actual tensors at a call."""

import ast
from collections.abc import Iterator

import torch
from torch import Tensor

# Functions and methods that return several views of one tensor.
_SPLITTING = frozenset(("chunk", "split", "tensor_split", "unbind"))


def view_names(function: ast.FunctionDef) -> dict[str, str]:
    """The names that may stand for views, with the source of the viewed expression; a call has to check the tensors."""
    views: dict[str, str] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            views.update(_views(node.targets[0], node.value))
    return views


def _views(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, str]]:
    """The names in a target that an assignment may bind to views, with the source of the viewed expression."""
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
        for element, part in zip(target.elts, value.elts, strict=True):
            yield from _views(element, part)
    elif isinstance(target, ast.Tuple) and isinstance(value, ast.Call):
        if getattr(value.func, "attr", getattr(value.func, "id", "")) in _SPLITTING:
            yield from ((name.id, ast.unparse(value)) for name in target.elts if isinstance(name, ast.Name))
    elif isinstance(target, ast.Name) and isinstance(value, ast.Subscript) and isinstance(value.value, ast.Name):
        yield target.id, value.value.id


def are_views_of_one_base(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors are views of one base: saving one keeps the storage of both, and sees writes to either.

    False under torch.compile, whose fake tensors do not tell.
    """
    if torch.compiler.is_compiling():
        return False
    base = tensor._base
    return base is not None and other._base is base and base.layout is torch.strided
