"""Reading expressions: what the loads in a method are, and whether operands may be evaluated before all else."""

import ast
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from .flow import comes_first


class Part(NamedTuple):
    """What a load in a method can be in a pattern: "linear", "act", "norm", "dropout", "F.dropout", "exchange", or "",
    which is any other plain load.

    An "act", which may be a formula too, has the activation's name, and is `of_new` if it counts only where what it is
    of has just been computed: torch does not keep that for it, so that somebody else may write to it.
    """

    kind: str = ""
    name: str = ""
    of_new: bool = False


# The part of each load and formula in a method, by its text.
Loads = Mapping[str, Part]


class Operand(NamedTuple):
    """What a site is given under a name: an expression as it is written."""

    name: str
    tree: ast.expr


class Match(NamedTuple):
    """A function of `sites`, its operands in the order in which they are evaluated, and its constants.

    `root` is the expression that it computes; `captured` are the operands that the original expression, where it has to
    run, must not evaluate again: the one that is no plain load, which is evaluated first, and the loads before it.
    """

    kind: str
    root: ast.expr
    operands: list[Operand]
    captured: list[Operand]
    options: dict[str, Any]
    said: str


class Reader:
    """Reads one function's expressions."""

    def __init__(
        self, loads: Loads, fast: frozenset[str], known: frozenset[str], formula: Callable[[ast.expr], Any]
    ) -> None:
        self.loads = loads
        self.fast = fast
        self.locals = known
        self.formula = formula

    def part(self, tree: ast.AST) -> Part:
        """What a load is."""
        is_load = isinstance(tree, ast.Name | ast.Attribute | ast.Subscript)
        return self.loads.get(ast.unparse(tree), Part()) if is_load else Part()

    def is_plain(self, tree: ast.AST) -> bool:
        """Whether evaluating it runs nobody's code."""
        if isinstance(tree, ast.Name):
            return tree.id in self.fast or (tree.id not in self.locals and tree.id in self.loads)
        if isinstance(tree, ast.Constant):
            return True
        return isinstance(tree, ast.Attribute | ast.Subscript) and ast.unparse(tree) in self.loads


def settled(
    reader: Reader,
    kind: str,
    root: ast.expr,
    operands: Sequence[Operand],
    options: dict[str, Any],
    begins: ast.expr,
    said: str,
) -> Match | None:
    """The match, if evaluating its operands first is what the original does, or cannot be told from that."""
    others = [operand for operand in operands if not reader.is_plain(operand.tree)]
    if len(others) > 1 or len({operand.name for operand in operands}) != len(operands):
        return None
    if not others:
        return Match(kind, root, list(operands), [], options, said)
    if not comes_first(begins, others[0].tree, reader.is_plain):
        return None
    before = []
    for node in _in_order(begins):
        found = next((operand for operand in operands if operand.tree is node), None)
        if found is not None:
            before.append(found)
        if found is others[0]:
            break
    else:
        return None
    rest = [operand for operand in operands if operand not in before]
    captured = [operand for operand in before if not isinstance(operand.tree, ast.Name) or operand is others[0]]
    return Match(kind, root, [*before, *rest], captured, options, said)


def _in_order(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes of calls and sums in the order in which they are begun to be evaluated."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        yield from _in_order(child)
