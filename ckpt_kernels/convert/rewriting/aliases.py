"""Parts of one tensor: the names in a function that seem to be such, and what is known of tensors at a call."""

import ast
from collections.abc import Iterator

import torch
from torch import Tensor

# What gives views of one tensor, each of a part of it.
_PARTING = frozenset(("chunk", "split", "tensor_split", "unbind"))


def view_names(function: ast.FunctionDef) -> dict[str, str]:
    """The names that are given parts of something, and in which statement; whether they are is seen at a call alone."""
    found: dict[str, str] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            found.update(_given(node.targets[0], node.value))
    return found


def _given(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, str]]:
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
        for each, part in zip(target.elts, value.elts, strict=True):
            yield from _given(each, part)
    elif isinstance(target, ast.Tuple) and isinstance(value, ast.Call):
        if getattr(value.func, "attr", getattr(value.func, "id", "")) in _PARTING:
            yield from ((name.id, ast.unparse(value)) for name in target.elts if isinstance(name, ast.Name))
    elif isinstance(target, ast.Name) and isinstance(value, ast.Subscript) and isinstance(value.value, ast.Name):
        yield target.id, value.value.id


def are_views_of_one_base(tensor: Tensor, other: Tensor) -> bool:
    """Whether both are views of one tensor: whoever keeps the one keeps the memory of both, and sees a write to either.

    (Where torch.compile asks, nobody knows.)
    """
    if torch.compiler.is_compiling():
        return False
    base = tensor._base
    return base is not None and other._base is base and base.layout is torch.strided
