"""Reading of expressions: the roles of loads, and whether a fused call keeps the evaluation order of the operands."""

import ast
from typing import TYPE_CHECKING, NamedTuple

from ..code.evaluation_order import in_evaluation_order, is_evaluated_first
from ..code.scope import Scope
from .aliases import view_names
from .roles import Role, Roles
from .templates import Pattern

if TYPE_CHECKING:
    from .matching import Attempt


class Operand(NamedTuple):
    """An operand of a fused call: a name of the pattern, and the expression for the operand."""

    name: str
    tree: ast.expr


class Match(NamedTuple):
    """An expression, `root`, that a pattern computes, with the operands in evaluation order.

    `captured` are the operands that must not be evaluated again if the original expression runs: the one that is no
    plain load, which is evaluated first, and the loads before that operand.
    """

    pattern: Pattern
    root: ast.expr
    operands: list[Operand]
    captured: list[Operand]
    attempt: "Attempt"


class Reader:
    """Reads the expressions of one function."""

    def __init__(self, roles: Roles, scope: Scope, tree: ast.FunctionDef) -> None:
        self.roles = roles
        self.scope = scope
        self._views = view_names(tree)

    def role(self, tree: ast.AST) -> Role:
        """The role of an expression; all but loads have the empty role."""
        is_load = isinstance(tree, ast.Name | ast.Attribute | ast.Subscript)
        return self.roles.get(ast.unparse(tree), Role()) if is_load else Role()

    def may_be_views(self, tree: ast.expr, other: ast.expr) -> bool:
        """Whether both are local names that may stand for views of one tensor."""
        names = [
            node.id for node in (tree, other) if isinstance(node, ast.Name) and node.id in self.scope.private_locals
        ]
        bases = {self._views.get(name) for name in names}
        return len(names) == 2 and len(bases) == 1 and None not in bases

    def is_plain(self, tree: ast.AST) -> bool:
        """Whether an expression is a plain load or constant, whose evaluation has no side effects."""
        if isinstance(tree, ast.Name):
            return tree.id in self.scope.private_locals or (tree.id not in self.scope.locals and tree.id in self.roles)
        if isinstance(tree, ast.Constant):
            return True
        return isinstance(tree, ast.Attribute | ast.Subscript) and ast.unparse(tree) in self.roles


def match_of(reader: Reader, root: ast.expr, begins: ast.expr, pattern: Pattern, attempt: "Attempt") -> Match | None:
    """The match of an attempt, None if evaluating all operands first could change what the original code does.

    `begins` is the expression that the original code evaluates first.
    """
    operands = attempt.operands
    computed = [operand for operand in operands if not reader.is_plain(operand.tree)]
    if len(computed) > 1 or len({operand.name for operand in operands}) != len(operands):
        return None
    if not computed:
        return Match(pattern, root, operands, [], attempt)
    if not is_evaluated_first(begins, computed[0].tree, reader.is_plain):
        return None
    # The original expression reads local names again, so that the computed operand must not rebind them.
    if any(isinstance(node, ast.NamedExpr) for node in ast.walk(computed[0].tree)):
        return None
    before = []
    for node in in_evaluation_order(begins):
        operand = next((operand for operand in operands if operand.tree is node), None)
        if operand is not None:
            before.append(operand)
        if operand is computed[0]:
            break
    else:
        return None
    rest = [operand for operand in operands if operand not in before]
    captured = [operand for operand in before if not isinstance(operand.tree, ast.Name) or operand is computed[0]]
    return Match(pattern, root, [*before, *rest], captured, attempt)
