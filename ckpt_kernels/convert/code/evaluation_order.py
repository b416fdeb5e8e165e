"""The order in which Python evaluates what is written: the one place that knows it.

After the language reference, "Evaluation order" and the simple statements: left to right, an assignment's value before
its targets, an augmented assignment's target before its value.
"""

import ast
from collections.abc import Callable, Iterator, Sequence


def evaluated_parts(tree: ast.AST) -> "Sequence[ast.AST] | None":
    """What is evaluated for a tree, in that order, the targets of statements included; None where that is not known, or
    not certain. What a part does besides, call, load or store, it does before the next part.

    `f(**a, b=c)` and `[*a, b]` iterate over `a` before they go on: of these the part is the star itself.
    """
    for kinds, of in _PARTS:
        if isinstance(tree, kinds):
            return of(tree)
    return None


def _call(tree: ast.Call) -> list[ast.AST]:
    return [tree.func, *tree.args, *(k if k.arg is None else k.value for k in tree.keywords)]


def _stored(target: ast.expr) -> list[ast.AST]:
    """What a target evaluates, and its names."""
    return list(target.elts) if isinstance(target, ast.Tuple | ast.List) else [target]


def _assigned(tree: ast.Assign) -> list[ast.AST]:
    return [tree.value, *(part for target in tree.targets for part in _stored(target))]


def _annotated(tree: ast.AnnAssign) -> list[ast.AST]:
    """Within a function, annotations of names are not evaluated."""
    return [tree.target] if tree.value is None else [tree.value, tree.target]


# The first of a conditional expression, and of comparisons and `and` in a row, is evaluated in all cases: what may not
# be is no part.
_PARTS: tuple[tuple[type | tuple[type, ...], Callable[..., Sequence[ast.AST]]], ...] = (
    ((ast.Name, ast.Constant), lambda tree: []),
    (ast.Attribute, lambda tree: [tree.value]),
    (ast.Subscript, lambda tree: [tree.value, tree.slice]),
    (ast.Slice, lambda tree: [bound for bound in (tree.lower, tree.upper, tree.step) if bound is not None]),
    ((ast.Starred, ast.keyword, ast.Expr), lambda tree: [tree.value]),
    (ast.Call, _call),
    (ast.BinOp, lambda tree: [tree.left, tree.right]),
    (ast.UnaryOp, lambda tree: [tree.operand]),
    (ast.Compare, lambda tree: [tree.left, tree.comparators[0]]),
    (ast.BoolOp, lambda tree: [tree.values[0]]),
    (ast.IfExp, lambda tree: [tree.test]),
    ((ast.Tuple, ast.List, ast.Set), lambda tree: list(tree.elts)),
    (ast.NamedExpr, lambda tree: [tree.value, tree.target]),
    (ast.Return, lambda tree: [] if tree.value is None else [tree.value]),
    (ast.Assign, _assigned),
    (ast.AugAssign, lambda tree: [tree.target, tree.value]),
    (ast.AnnAssign, _annotated),
)


def is_evaluated_first(tree: ast.AST, wanted: ast.AST, is_plain: Callable[[ast.AST], bool]) -> bool:
    """Whether all that is evaluated before `wanted`, which is part of `tree`, are plain loads, or calls around it."""
    if tree is wanted:
        return True
    for part in evaluated_parts(tree) or ():
        if any(node is wanted for node in ast.walk(part)):
            return is_evaluated_first(part, wanted, is_plain)
        if not is_plain(part):
            return False
    return False


def in_evaluation_order(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a tree in the order in which they are begun to be evaluated, where that is known and certain."""
    yield tree
    for part in evaluated_parts(tree) or ():
        yield from in_evaluation_order(part)


def first_use(tree: ast.AST, name: str) -> str:
    """What a statement does first with a local name: "read", which it is where that is not known, "stored", or ""."""
    if isinstance(tree, ast.Name) and tree.id == name:
        return "stored" if isinstance(tree.ctx, ast.Store) else "read"
    if isinstance(tree, ast.AugAssign) and isinstance(tree.target, ast.Name) and tree.target.id == name:
        return "read"
    if not count_uses(tree, name):
        return ""
    for part in evaluated_parts(tree) or ():
        used = first_use(part, name)
        if used:
            return used
    return "read"


def count_uses(tree: ast.AST, name: str) -> int:
    """How often a name stands in a tree."""
    return sum(isinstance(node, ast.Name) and node.id == name for node in ast.walk(tree))


def loaded_names(statement: ast.stmt) -> Iterator[ast.Name]:
    """The names that a statement reads, that of an augmented assignment's target among them."""
    target = statement.target if isinstance(statement, ast.AugAssign) else None
    for node in ast.walk(statement):
        if isinstance(node, ast.Name) and (isinstance(node.ctx, ast.Load) or node is target):
            yield node
