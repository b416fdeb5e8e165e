"""Whether a function treats tensors of every size as it treats small ones, by the way it is written.

What a trial shows of small tensors holds for large ones if nothing depends on how large they are but parts that are
bounded by the length of a last dimension or half of it, or every second element there. So that is all that sizes may be
read for, beside the shape of a view. It may choose its way by an argument that is a number, a truth value or None, and
by nothing else: a trial with the same goes the same way. Whatever else is written with sizes, in brackets, or that
compares, is not understood.
"""

import ast
import types
from collections.abc import Iterator

from .source import NoSource, definition_of

# Indices of a shape.
_INDICES = (0, 1, 2, 3, -1, -2, -3, -4)
# A fourth index is the last dimension's: no trial has more dimensions.
MOST_DIMENSIONS = 4
_NOT_UNDERSTOOD = tuple(
    getattr(ast, name) for name in "NamedExpr comprehension Lambda Compare BoolOp IfExp Await Yield YieldFrom".split()
)
_STATEMENTS = (ast.Assign, ast.Expr, ast.If, ast.Pass, ast.Raise, ast.Return)
_ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Div)


def is_size_independent(function: types.FunctionType) -> bool:
    """Whether sizes bound parts of last dimensions, and do nothing else."""
    try:
        tree = definition_of(function).tree
    except NoSource:
        return False
    return _Parts(tree).are_understood()


class _Parts:
    def __init__(self, tree: ast.FunctionDef) -> None:
        arguments = (*tree.args.posonlyargs, *tree.args.args, *tree.args.kwonlyargs)
        self._arguments = {argument.arg for argument in arguments}
        self._nodes = [node for statement in tree.body for node in ast.walk(statement)]
        self._parents = {child: node for node in self._nodes for child in ast.iter_child_nodes(node)}
        self._values: dict[str, list[ast.expr | None]] = {}
        self._decisions = {node.test for node in self._nodes if isinstance(node, ast.If)}
        for node in self._nodes:
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    self._assign(target, node.value)

    def _assign(self, target: ast.expr, value: ast.expr | None) -> None:
        if isinstance(target, ast.Starred):
            self._assign(target.value, None)
        elif isinstance(target, ast.Name):
            self._values.setdefault(target.id, []).append(value)
        elif isinstance(target, ast.Tuple | ast.List):
            parts = value.elts if isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts) else None
            for index, part in enumerate(target.elts):
                self._assign(part, None if parts is None else parts[index])

    def are_understood(self) -> bool:
        if not all(map(self._is_by_setting, self._decisions)):
            return False
        for node in self._nodes:
            if isinstance(node, ast.stmt) and not isinstance(node, _STATEMENTS):
                return False
            if isinstance(node, _NOT_UNDERSTOOD) and node not in self._decisions:
                return False
            if isinstance(node, ast.BinOp) and not isinstance(node.op, _ARITHMETIC) and not _is_half(node):
                return False
            if isinstance(node, ast.Subscript) and not self._is_understood(node):
                return False
        return all(map(self._stays, self._sizes()))

    def _is_by_setting(self, test: ast.expr) -> bool:
        """flag, not flag, dimension == 1, dimension is None, where the name is an argument."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            test = test.operand
        elif isinstance(test, ast.Compare):
            if not isinstance(test.ops[0], ast.Eq | ast.NotEq | ast.Is | ast.IsNot) or len(test.ops) > 1:
                return False
            if _number(test.comparators[0]) is None and not _is_none(test.comparators[0]):
                return False
            test = test.left
        return isinstance(test, ast.Name) and test.id in self._arguments and test.id not in self._values

    def _sizes(self) -> Iterator[ast.AST]:
        """Where shapes and sizes are read, and names that they have been given."""
        names = {name for name, values in self._values.items() if any(map(self._reads_a_size, values))}
        for node in self._nodes:
            if isinstance(node, ast.Attribute) and node.attr in ("shape", "size"):
                yield node
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in names:
                yield node

    def _reads_a_size(self, value: ast.expr | None) -> bool:
        """Where it is not known what a name is given, it may be a size: `a, b = x.shape`."""
        if value is None:
            return True
        return self._is_length(value) or (isinstance(value, ast.Attribute) and value.attr == "shape")

    def _stays(self, node: ast.AST) -> bool:
        """Whether a size goes nowhere but into a bound, into the shape of a view, or into a name."""
        parent = self._parents.get(node)
        if isinstance(node, ast.Name) and not self._is_length(node):
            # A part of what several values were given by: a tensor, as shapes are not parted. One that is a size at
            # times is not understood.
            return not any(value is not None and self._reads_a_size(value) for value in self._values[node.id])
        while isinstance(parent, ast.Subscript | ast.UnaryOp | ast.BinOp | ast.Starred) or (
            isinstance(parent, ast.Call) and parent.func is node
        ):
            if isinstance(parent, ast.Subscript) and parent.value is not node:
                return False
            if isinstance(parent, ast.BinOp) and not _is_half(parent):
                return False
            node, parent = parent, self._parents.get(parent)
        if isinstance(parent, ast.Slice):
            return True
        if isinstance(parent, ast.Call):
            return isinstance(parent.func, ast.Attribute) and parent.func.attr in ("view", "reshape")
        if isinstance(parent, ast.Tuple):
            parent = self._parents.get(parent)
        return isinstance(parent, ast.Assign) and (not isinstance(node, ast.expr) or self._is_length(node))

    def _is_understood(self, node: ast.Subscript) -> bool:
        index = node.slice
        if isinstance(node.value, ast.Attribute) and node.value.attr == "shape":
            # x.shape[-1], x.shape[:-1]
            bounds = [index.lower, index.upper, index.step] if isinstance(index, ast.Slice) else [index]
            return all(bound is None or _number(bound) in _INDICES for bound in bounds)
        parts = index.elts if isinstance(index, ast.Tuple) else [index]
        if not parts:
            return False
        *before, last = parts
        if not all(_is_ellipsis(part) or _is_none(part) or _is_whole(part) for part in before):
            return False
        if _is_ellipsis(last) or _is_none(last) or _is_whole(last):
            return True
        is_last = any(map(_is_ellipsis, before)) or len([p for p in parts if not _is_none(p)]) == MOST_DIMENSIONS
        return is_last and isinstance(last, ast.Slice) and self._is_by_length(last)

    def _is_by_length(self, part: ast.Slice) -> bool:
        """x[..., ::2], x[..., 1::2], x[..., :n], x[..., n:], x[..., :-n], x[..., -n:]"""
        if part.step is not None:
            first = 0 if part.lower is None else _number(part.lower)
            return _number(part.step) == 2 and part.upper is None and first in (0, 1)
        bounds = [bound for bound in (part.lower, part.upper) if bound is not None]
        if len(bounds) != 1:
            return False
        (bound,) = bounds
        if isinstance(bound, ast.UnaryOp) and isinstance(bound.op, ast.USub):
            bound = bound.operand
        return self._is_length(bound)

    def _is_length(self, tree: ast.expr | None, may_be_half: bool = True, depth: int = 4) -> bool:
        """Of a last dimension, or half of it."""
        if tree is None or not depth:
            return False
        if isinstance(tree, ast.Name):
            values = self._values.get(tree.id, [])
            if tree.id in self._arguments or not values:
                return False
            return all(self._is_length(value, may_be_half, depth - 1) for value in values)
        if isinstance(tree, ast.BinOp):
            return may_be_half and _is_half(tree) and self._is_length(tree.left, False, depth - 1)
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
