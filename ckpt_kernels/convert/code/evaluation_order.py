"""Python's evaluation order.

From the language reference, "Evaluation order" and "Simple statements": left to right, the value of an assignment
before the targets, the target of an augmented assignment before the value.
"""

import ast
from collections.abc import Callable, Iterator, Sequence


def evaluated_parts(tree: ast.AST) -> "Sequence[ast.AST] | None":
    """The children of a node that are always evaluated, in order, targets included; None for other kinds of nodes.

    A child's own call, load or store happens before the next child is evaluated. For `f(**a, b=c)` and `[*a, b]`,
    which iterate over `a` before they evaluate the rest, the child is the starred node.
    """
    for kinds, children_of in _PARTS:
        if isinstance(tree, kinds):
            return children_of(tree)
    return None


def _call(tree: ast.Call) -> list[ast.AST]:
    return [tree.func, *tree.args, *(k if k.arg is None else k.value for k in tree.keywords)]


def _stored(target: ast.expr) -> list[ast.AST]:
    """The nodes that storing to a target evaluates."""
    return list(target.elts) if isinstance(target, ast.Tuple | ast.List) else [target]


def _assigned(tree: ast.Assign) -> list[ast.AST]:
    return [tree.value, *(part for target in tree.targets for part in _stored(target))]


def _annotated(tree: ast.AnnAssign) -> list[ast.AST]:
    """Without the annotation, which is not evaluated within a function. Without a value nothing is stored."""
    if tree.value is not None:
        return [tree.value, tree.target]
    return [] if isinstance(tree.target, ast.Name) else list(evaluated_parts(tree.target) or ())


# Conditional expressions, and chains of comparisons, `and` and `or`, have only operands that are always evaluated.
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


def is_evaluated_first(tree: ast.AST, descendant: ast.AST, is_plain: Callable[[ast.AST], bool]) -> bool:
    """Whether everything that `tree` evaluates before its `descendant` is plain by `is_plain`."""
    if tree is descendant:
        return True
    for part in evaluated_parts(tree) or ():
        if any(node is descendant for node in ast.walk(part)):
            return is_evaluated_first(part, descendant, is_plain)
        if not is_plain(part):
            return False
    return False


def in_evaluation_order(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a tree that are always evaluated, in the order in which their evaluation begins."""
    yield tree
    for part in evaluated_parts(tree) or ():
        yield from in_evaluation_order(part)


def first_use(tree: ast.AST, name: str) -> str:
    """The first use of a local name in a statement: "read", which is also the answer in doubt, "stored", or ""."""
    if isinstance(tree, ast.Name) and tree.id == name:
        return "stored" if isinstance(tree.ctx, ast.Store) else "read"
    if isinstance(tree, ast.AugAssign) and isinstance(tree.target, ast.Name) and tree.target.id == name:
        return "read"
    if not count_uses(tree, name):
        return ""
    for part in evaluated_parts(tree) or ():
        use = first_use(part, name)
        if use:
            return use
    return "read"


def count_uses(tree: ast.AST, name: str) -> int:
    """The number of nodes in a tree that read, store or delete a name."""
    return sum(isinstance(node, ast.Name) and node.id == name for node in ast.walk(tree))


def loaded_names(statement: ast.stmt) -> Iterator[ast.Name]:
    """The names that a statement reads, including the target of an augmented assignment."""
    target = statement.target if isinstance(statement, ast.AugAssign) else None
    for node in ast.walk(statement):
        if isinstance(node, ast.Name) and (isinstance(node.ctx, ast.Load) or node is target):
            yield node
