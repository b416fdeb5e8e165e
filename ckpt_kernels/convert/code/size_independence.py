"""Size independence: whether a function, by its source, treats tensors of every size as it treats small ones.

The results of a trial with small tensors then hold for large ones. Sizes may only bound slices of the last dimension,
by its length or half of that, and shape views; a slice may also take every second element. The function may branch only
on arguments that are numbers, booleans or None, so that a trial with the same arguments takes the same branch. Any
other use of sizes, any other index and any other comparison is rejected.
"""

import ast
import types
from collections.abc import Iterator

from .source import tree_of
from .syntax_trees import index_parts, is_name, keeps_dimensions

# Allowed indices of a shape.
_INDICES = (0, 1, 2, 3, -1, -2, -3, -4)
# No trial has more dimensions, so that a fourth index is that of the last dimension.
_MAX_DIMENSIONS = 4
_REJECTED = tuple(
    getattr(ast, name) for name in "NamedExpr comprehension Lambda Compare BoolOp IfExp Await Yield YieldFrom".split()
)
_STATEMENTS = (ast.Assign, ast.Expr, ast.If, ast.Pass, ast.Raise, ast.Return)
_ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Div)


def is_size_independent(function: types.FunctionType) -> bool:
    """Whether the function uses sizes only to bound slices of last dimensions and to shape views."""
    tree = tree_of(function)
    return tree is not None and _SizeUses(tree).are_allowed()


class _SizeUses:
    """The uses of sizes in the body of a function."""

    def __init__(self, tree: ast.FunctionDef) -> None:
        arguments = (*tree.args.posonlyargs, *tree.args.args, *tree.args.kwonlyargs)
        self._arguments = {argument.arg for argument in arguments}
        self._nodes = [node for statement in tree.body for node in ast.walk(statement)]
        self._parents = {child: node for node in self._nodes for child in ast.iter_child_nodes(node)}
        self._values: dict[str, list[ast.expr | None]] = {}
        self._tests = {node.test for node in self._nodes if isinstance(node, ast.If)}
        for node in self._nodes:
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    self._assign(target, node.value)

    def _assign(self, target: ast.expr, value: ast.expr | None) -> None:
        """Record that a target is bound to a value, None if the value is unknown."""
        if isinstance(target, ast.Starred):
            self._assign(target.value, None)
        elif isinstance(target, ast.Name):
            self._values.setdefault(target.id, []).append(value)
        elif isinstance(target, ast.Tuple | ast.List):
            values = value.elts if isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts) else None
            for index, element in enumerate(target.elts):
                self._assign(element, None if values is None else values[index])

    def are_allowed(self) -> bool:
        """Whether all statements, tests, indices and uses of sizes are allowed."""
        if not all(map(self._is_setting_test, self._tests)):
            return False
        for node in self._nodes:
            if isinstance(node, ast.stmt) and not isinstance(node, _STATEMENTS):
                return False
            if isinstance(node, _REJECTED) and node not in self._tests:
                return False
            if isinstance(node, ast.BinOp) and not isinstance(node.op, _ARITHMETIC) and not _is_half(node):
                return False
            if isinstance(node, ast.Subscript) and not self._is_allowed_index(node):
                return False
        return all(map(self._is_allowed_use, self._size_nodes()))

    def _is_setting_test(self, test: ast.expr) -> bool:
        """Whether a test is `flag`, `not flag`, `dim == 1`, `dim is None` or the like of an argument."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            test = test.operand
        elif isinstance(test, ast.Compare):
            if not isinstance(test.ops[0], ast.Eq | ast.NotEq | ast.Is | ast.IsNot) or len(test.ops) > 1:
                return False
            if _number(test.comparators[0]) is None and not _is_none(test.comparators[0]):
                return False
            test = test.left
        return is_name(test, self._arguments) and test.id not in self._values

    def _size_nodes(self) -> Iterator[ast.AST]:
        """The nodes that read shapes and sizes, and those that read names bound to them."""
        names = {name for name, values in self._values.items() if any(map(self._may_be_size, values))}
        for node in self._nodes:
            if isinstance(node, ast.Attribute) and node.attr in ("shape", "size"):
                yield node
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in names:
                yield node

    def _may_be_size(self, value: ast.expr | None) -> bool:
        """Whether a value is a shape or a length; None, an unknown value, may be: `a, b = x.shape`."""
        if value is None:
            return True
        return self._is_length(value) or (isinstance(value, ast.Attribute) and value.attr == "shape")

    def _is_allowed_use(self, node: ast.AST) -> bool:
        """Whether a node that reads a size bounds a slice, shapes a view, or is assigned to a name."""
        parent = self._parents.get(node)
        if isinstance(node, ast.Name) and not self._is_length(node):
            # The name is bound by unpacking, so to tensors: shapes are never unpacked. A name that is also bound to a
            # size is rejected.
            return not any(value is not None and self._may_be_size(value) for value in self._values[node.id])
        while isinstance(parent, ast.Subscript | ast.UnaryOp | ast.BinOp | ast.Starred) or (
            isinstance(parent, ast.Call) and parent.func is node
        ):
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

    def _is_allowed_index(self, node: ast.Subscript) -> bool:
        """Whether the index is one of a shape, or takes whole dimensions and an allowed slice of the last."""
        index = node.slice
        if isinstance(node.value, ast.Attribute) and node.value.attr == "shape":
            # Such as x.shape[-1] and x.shape[:-1].
            bounds = [index.lower, index.upper, index.step] if isinstance(index, ast.Slice) else [index]
            return all(bound is None or _number(bound) in _INDICES for bound in bounds)
        parts = index_parts(node)
        if not parts:
            return False
        *before, last = parts
        if not all(map(keeps_dimensions, before)):
            return False
        if keeps_dimensions(last):
            return True
        is_last = any(map(_is_ellipsis, before)) or len([p for p in parts if not _is_none(p)]) == _MAX_DIMENSIONS
        return is_last and isinstance(last, ast.Slice) and self._is_allowed_slice(last)

    def _is_allowed_slice(self, part: ast.Slice) -> bool:
        """Whether a slice is `::2`, `1::2`, `:n`, `n:`, `:-n` or `-n:`, where `n` is as in `_is_length`."""
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
        """Whether an expression is the length of a last dimension, or half of that length."""
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
        return tree.func.attr == "size" and [_number(a) for a in tree.args] == [-1]


def _is_half(tree: ast.BinOp) -> bool:
    return isinstance(tree.op, ast.FloorDiv) and _number(tree.right) == 2


def _number(tree: ast.expr) -> int | None:
    """The value of an integer literal, None for other expressions."""
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        number = _number(tree.operand)
        return None if number is None else -number
    return tree.value if isinstance(tree, ast.Constant) and type(tree.value) is int else None


def _is_ellipsis(tree: ast.expr) -> bool:
    return isinstance(tree, ast.Constant) and tree.value is Ellipsis


def _is_none(tree: ast.expr) -> bool:
    return isinstance(tree, ast.Constant) and tree.value is None
