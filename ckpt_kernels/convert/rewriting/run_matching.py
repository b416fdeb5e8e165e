"""Pattern matching over several statements: runs that bind names to parts of a pattern, and a sum before its norm."""

import ast
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from ..code.evaluation_order import is_evaluated_first
from ..code.straight_line import Block, runs_ending_at
from ..code.syntax_trees import assigns, copies, expressions_in
from . import fused_patterns
from .matching import Match, attempts, match_of, matches
from .reader import Operand, Reader

# The sums in the spellings of a norm of a sum.
_SUMS = tuple(spelling.args[0] for spelling in fused_patterns.add_norm.spellings if isinstance(spelling, ast.Call))


class RunMatch(NamedTuple):
    """A match in the statements `begin` to `end` of a block, both included.

    The match is in the last statement; with a `norm` in the last statement, the match is the sum in the first one.
    """

    match: Match
    begin: int
    end: int
    norm: ast.expr | None = None


def rank(candidate: RunMatch) -> tuple[int, int]:
    """Larger patterns come first, and then longer runs."""
    return fused_patterns.PATTERNS.index(candidate.match.pattern), candidate.begin - candidate.end


def run_matches(
    reader: Reader, function: ast.FunctionDef, block: Block, written: Collection[str]
) -> Iterator[RunMatch]:
    """The matches in runs of a block. `written` are the names of tensors that the function may write to."""
    statements: list[Any] = block.statements
    for end, last in enumerate(statements):
        if not isinstance(last, ast.Assign | ast.AugAssign | ast.Return | ast.Expr) or last.value is None:
            continue
        for run in runs_ending_at(function, block, end, reader.scope):
            first = statements[run.begin].value
            for root in expressions_in(last.value):
                if not is_evaluated_first(last, root, reader.is_plain):
                    continue
                match = next(matches(reader, root, run, first), None)
                if match is not None:
                    yield RunMatch(match, run.begin, end)
        yield from _sum_matches(reader, statements, end, written)


def _sum_matches(reader: Reader, statements: list[Any], end: int, written: Collection[str]) -> Iterator[RunMatch]:
    """A sum that is bound to a name, and the norm of that name at `end`; statements between only copy the name."""
    last = statements[end]
    for root in expressions_in(last.value):
        if not isinstance(root, ast.Call) or len(root.args) != 1 or root.keywords:
            continue
        name = root.args[0]
        if not isinstance(name, ast.Name) or name.id not in reader.scope.private_locals:
            continue
        if reader.role(root.func).kind != "norm":
            continue
        begin = end - 1
        while begin >= 0 and copies(statements[begin], name.id):
            begin -= 1
        if begin < 0 or not assigns(statements[begin], name.id):
            continue
        names = {n.id for s in statements[begin:end] for n in ast.walk(s) if isinstance(n, ast.Name)}
        if not names.isdisjoint(written) or not is_evaluated_first(last, root, reader.is_plain):
            continue
        total = statements[begin].value
        for attempt in attempts(reader, total, None, fused_patterns.add_norm, _SUMS):
            attempt.operands.append(Operand("norm", root.func))
            attempt.options["total"] = True
            match = match_of(reader, total, total, fused_patterns.add_norm, attempt)
            if match is not None:
                yield RunMatch(match, begin, end, root)
                break
