"""Whether a function takes parts of tensors in a way that holds for tensors of every size.

What a trial shows of small tensors holds for large ones if no part is bounded by a number. So a bound is the length of
a last dimension, or half of that, and bounds a last dimension; or every second element is taken there. That is read in
the source; whatever else is written in brackets is not understood.
"""

import ast
import types

from .source import NoSource, definition_of

# Of a shape, or of several results.
_INDICES = (0, 1, 2, 3, -1, -2, -3, -4)
# What tensors, all of them or none, may be asked for how long they are.
_MOST_DIMENSIONS = 4


def are_parts_by_shape(function: types.FunctionType) -> bool:
    """Whether all that is in brackets is such a part, an index of a shape, or a new dimension."""
    try:
        tree = definition_of(function).tree
    except NoSource:
        return False
    return _Parts(tree).are_understood()


class _Parts:
    def __init__(self, tree: ast.FunctionDef) -> None:
        self._arguments = {argument.arg for argument in ast.walk(tree.args) if isinstance(argument, ast.arg)}
        self._values: dict[str, list[ast.expr | None]] = {}
        self._nodes = [node for statement in tree.body for node in ast.walk(statement)]
        for node in self._nodes:
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    self._assign(target, node.value)
            elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
                # One that is given a value in another way has None among its values.
                self._values.setdefault(node.id, [])

    def _assign(self, target: ast.expr, value: ast.expr | None) -> None:
        if isinstance(target, ast.Name):
            self._values.setdefault(target.id, []).append(value)
        elif isinstance(target, ast.Tuple | ast.List):
            parts = value.elts if isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts) else None
            for index, part in enumerate(target.elts):
                self._assign(part, None if parts is None else parts[index])

    def are_understood(self) -> bool:
        for node in self._nodes:
            if isinstance(node, ast.Subscript) and not self._is_understood(node):
                return False
            if isinstance(node, ast.AugAssign | ast.NamedExpr | ast.For | ast.While | ast.comprehension | ast.Lambda):
                return False
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.FloorDiv | ast.Mod) and not _is_half(node):
                return False
        return True

    def _is_understood(self, node: ast.Subscript) -> bool:
        index = node.slice
        if isinstance(node.value, ast.Attribute) and node.value.attr == "shape":
            # x.shape[-1], x.shape[:-1]
            bounds = [index.lower, index.upper, index.step] if isinstance(index, ast.Slice) else [index]
            return all(bound is None or _number(bound) in _INDICES for bound in bounds)
        parts = index.elts if isinstance(index, ast.Tuple) else [index]
        if not parts or any(_number(part) is not None for part in parts):
            return False
        *before, last = parts
        if not all(_is_ellipsis(part) or _is_none(part) or _is_whole(part) for part in before):
            return False
        if _is_ellipsis(last) or _is_none(last) or _is_whole(last):
            return True
        is_last = any(map(_is_ellipsis, before)) or len([p for p in parts if not _is_none(p)]) == _MOST_DIMENSIONS
        return is_last and isinstance(last, ast.Slice) and self._is_by_length(last)

    def _is_by_length(self, part: ast.Slice) -> bool:
        """x[..., ::2], x[..., 1::2], x[..., :n], x[..., n:], x[..., :-n], x[..., -n:]"""
        if part.step is not None:
            return (
                _number(part.step) == 2 and part.upper is None and (part.lower is None or _number(part.lower) in (0, 1))
            )
        bounds = [bound for bound in (part.lower, part.upper) if bound is not None]
        if len(bounds) != 1:
            return False
        (bound,) = bounds
        if isinstance(bound, ast.UnaryOp) and isinstance(bound.op, ast.USub):
            bound = bound.operand
        return self._is_length(bound)

    def _is_length(self, tree: ast.expr | None, depth: int = 8) -> bool:
        """Of a last dimension, or half of it."""
        if tree is None or not depth:
            return False
        if isinstance(tree, ast.Name):
            values = self._values.get(tree.id)
            own = tree.id not in self._arguments and bool(values)
            return own and all(self._is_length(value, depth - 1) for value in values or ())
        if isinstance(tree, ast.BinOp):
            return _is_half(tree) and self._is_length(tree.left, depth - 1)
        if isinstance(tree, ast.Subscript):
            return isinstance(tree.value, ast.Attribute) and tree.value.attr == "shape" and _number(tree.slice) == -1
        if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Attribute):
            return False
        return tree.func.attr == "size" and not tree.keywords and [_number(a) for a in tree.args] == [-1]


def _is_half(tree: ast.BinOp) -> bool:
    return isinstance(tree.op, ast.FloorDiv) and _number(tree.right) == 2


def _number(tree: ast.expr) -> int | None:
    """A whole number that is written there."""
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        number = _number(tree.operand)
        return None if number is None else -number
    return tree.value if isinstance(tree, ast.Constant) and type(tree.value) is int else None


def _is_ellipsis(tree: ast.expr) -> bool:
    return isinstance(tree, ast.Constant) and tree.value is Ellipsis


def _is_none(tree: ast.expr) -> bool:
    return isinstance(tree, ast.Constant) and tree.value is None


def _is_whole(tree: ast.expr) -> bool:
    return isinstance(tree, ast.Slice) and tree.lower is None and tree.upper is None and tree.step is None
