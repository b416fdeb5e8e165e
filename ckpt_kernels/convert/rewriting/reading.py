"""Reading expressions: what the loads in a method are, and whether operands may be evaluated before all else."""

import ast
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ..code.flow import Meaning
from ..code.order import comes_first, in_order
from ..code.scope import Scope
from .formulas import Formula, formula_of
from .parts import parts_in
from .templates import Pattern

if TYPE_CHECKING:
    from .patterns import Attempt


# Of a linear layer with an adapter around it.
ADAPTED = "adapted"
# The kind of a module that is none of the others.
MODULE = "module"


class Part(NamedTuple):
    """What a load in a method can be in a pattern: "linear", "act", "norm", "dropout", "F.dropout", "halves" (which is
    torch.chunk), "exchange", "module", which is any other, "noted", which no load is but
    whose name says why the method's operators are noted (see `gains`), or "", which is any other plain load.

    A "linear" may have an adapter around it by now, as its name says.
    An "act", which may be a formula too, has the activation's name, and is `of_new` if it counts only where what it is
    of has just been computed: torch does not keep that for it, so that somebody else may write to it. `known` are the
    functions and numbers that a formula was known with, a function that is an "act" by itself, and the module or
    function that an "exchange" is of. A formula is not `is_exact` where its numbers are rounded, which float64 can
    tell.
    """

    kind: str = ""
    name: str = ""
    of_new: bool = False
    known: tuple[Any, ...] = ()
    is_exact: bool = True


# The part of each load and formula in a method, by its text.
Loads = Mapping[str, Part]


def are_worth_it(parts: Iterable[tuple[str, Part]], recompute: str = "output") -> bool:
    """Whether anything may be found with them. Modules that are nothing to us count in layers alone."""
    kinds = {part.kind for _, part in parts} - {""}
    return bool(kinds if recompute == "layer" else kinds - {MODULE})


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

    def __init__(self, loads: Loads, scope: Scope, tree: ast.FunctionDef) -> None:
        self.loads = loads
        self.fast = scope.fast
        self.locals = scope.locals
        self._scope = scope
        self._parts = parts_in(tree)

    def formula(self, tree: ast.AST, meanings: Mapping[int, Meaning]) -> Formula | None:
        """An expression as a formula of one value, and what `meanings` has for the names in it."""
        return formula_of(tree, self._scope, meanings)

    def part(self, tree: ast.AST) -> Part:
        """What a load is."""
        is_load = isinstance(tree, ast.Name | ast.Attribute | ast.Subscript)
        return self.loads.get(ast.unparse(tree), Part()) if is_load else Part()

    def are_parts(self, tree: ast.expr, other: ast.expr) -> bool:
        """Whether both are local names that seem to stand for parts of one tensor."""
        names = [node.id for node in (tree, other) if isinstance(node, ast.Name) and node.id in self.fast]
        whole = {self._parts.get(name) for name in names}
        return len(names) == 2 and len(whole) == 1 and None not in whole

    def is_plain(self, tree: ast.AST) -> bool:
        """Whether evaluating it runs nobody's code."""
        if isinstance(tree, ast.Name):
            return tree.id in self.fast or (tree.id not in self.locals and tree.id in self.loads)
        if isinstance(tree, ast.Constant):
            return True
        return isinstance(tree, ast.Attribute | ast.Subscript) and ast.unparse(tree) in self.loads


def settled(reader: Reader, root: ast.expr, begins: ast.expr, pattern: Pattern, attempt: "Attempt") -> Match | None:
    """The match, if evaluating its operands first is what the original does, or cannot be told from that."""
    operands = attempt.operands
    others = [operand for operand in operands if not reader.is_plain(operand.tree)]
    if len(others) > 1 or len({operand.name for operand in operands}) != len(operands):
        return None
    if not others:
        return Match(pattern, root, operands, [], attempt)
    if not comes_first(begins, others[0].tree, reader.is_plain):
        return None
    # Local names before it are read again where the original has to run: it must not give them other values.
    if any(isinstance(node, ast.NamedExpr) for node in ast.walk(others[0].tree)):
        return None
    before = []
    for node in in_order(begins):
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
