"""Reading expressions: what the loads in a method are, and whether operands may be evaluated before all else."""

import ast
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from ..code.evaluation_order import in_evaluation_order, is_evaluated_first
from ..code.scope import Scope
from ..code.straight_line import Binding
from .aliases import view_names
from .formulas import Formula, formula_of
from .roles import Role, Roles
from .templates import Pattern

if TYPE_CHECKING:
    from .matching import Attempt


class Operand(NamedTuple):
    """What a site is given under a name: an expression as it is written."""

    name: str
    tree: ast.expr


class Match(NamedTuple):
    """An expression, `root`, that a pattern computes, as it was read, with its operands in the order in which they are
    evaluated.

    `captured` are the operands that the original expression, where it has to run, must not evaluate again: the one that
    is no plain load, which is evaluated first, and the loads before it.
    """

    pattern: Pattern
    root: ast.expr
    operands: list[Operand]
    captured: list[Operand]
    attempt: "Attempt"


class Reader:
    """Reads one function's expressions."""

    def __init__(self, loads: Roles, scope: Scope, tree: ast.FunctionDef) -> None:
        self.loads = loads
        self.private_locals = scope.private_locals
        self.locals = scope.locals
        self._scope = scope
        self._parts = view_names(tree)

    def formula(self, tree: ast.AST, bindings: Mapping[int, Binding]) -> Formula | None:
        """An expression as a formula of one value, and what `bindings` has for the names in it."""
        return formula_of(tree, self._scope, bindings)

    def part(self, tree: ast.AST) -> Role:
        """What a load is."""
        is_load = isinstance(tree, ast.Name | ast.Attribute | ast.Subscript)
        return self.loads.get(ast.unparse(tree), Role()) if is_load else Role()

    def are_parts(self, tree: ast.expr, other: ast.expr) -> bool:
        """Whether both are local names that seem to stand for parts of one tensor."""
        names = [node.id for node in (tree, other) if isinstance(node, ast.Name) and node.id in self.private_locals]
        whole = {self._parts.get(name) for name in names}
        return len(names) == 2 and len(whole) == 1 and None not in whole

    def is_plain(self, tree: ast.AST) -> bool:
        """Whether evaluating it runs nobody's code."""
        if isinstance(tree, ast.Name):
            return tree.id in self.private_locals or (tree.id not in self.locals and tree.id in self.loads)
        if isinstance(tree, ast.Constant):
            return True
        return isinstance(tree, ast.Attribute | ast.Subscript) and ast.unparse(tree) in self.loads


def match_of(reader: Reader, root: ast.expr, begins: ast.expr, pattern: Pattern, attempt: "Attempt") -> Match | None:
    """The match, if evaluating its operands first is what the original does, or cannot be told from that."""
    operands = attempt.operands
    others = [operand for operand in operands if not reader.is_plain(operand.tree)]
    if len(others) > 1 or len({operand.name for operand in operands}) != len(operands):
        return None
    if not others:
        return Match(pattern, root, operands, [], attempt)
    if not is_evaluated_first(begins, others[0].tree, reader.is_plain):
        return None
    # Local names before it are read again where the original has to run: it must not give them other values.
    if any(isinstance(node, ast.NamedExpr) for node in ast.walk(others[0].tree)):
        return None
    before = []
    for node in in_evaluation_order(begins):
        found = next((operand for operand in operands if operand.tree is node), None)
        if found is not None:
            before.append(found)
        if found is others[0]:
            break
    else:
        return None
    rest = [operand for operand in operands if operand not in before]
    captured = [operand for operand in before if not isinstance(operand.tree, ast.Name) or operand is others[0]]
    return Match(pattern, root, [*before, *rest], captured, attempt)
