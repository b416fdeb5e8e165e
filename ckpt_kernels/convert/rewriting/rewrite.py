"""A method with calls of `sites` in the place of what they compute, and everything else as it was written.

An expression becomes `results.pop() if (results := site(...)).pop() else expression`, and a run of statements

    if (results := site(...)).pop(): the last statement, with results.pop() for what was computed
    else: the statements as they were written

What the site is given is evaluated once and in the order in which it was written.
"""

import ast
import copy
import types
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ...levels import level_of_blocks
from ...recompute import watch
from ..code.flow import CLOSED, LONGEST, Block, blocks, run_of
from ..code.frames import PREFIX
from ..code.order import comes_first
from ..code.scope import Scope
from ..code.source import Definition, NoSource, decorated, definition_of, layers_of, rebuilt
from ..code.trees import assigns, at, copies, expressions_in, replaced, with_parts
from ..code.writes import written_names
from ..rules.function_trials import activation_function
from . import sites, templates
from .exchange import FUNCTION_TYPES, exchange_for
from .gains import IN_LAYERS, gains_of_notes, is_picked
from .notes import FUNCTIONS, OPERATORS, noted_function, noted_operator
from .objects import exchanged_object
from .patterns import attempts, matches
from .quick import quick_site
from .reading import Loads, Match, Operand, Part, Reader, settled
from .results import has_computed, taken

_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
# The sum in a norm of one.
_SUMS = tuple(spelling.args[0] for spelling in sites.add_norm.spellings if isinstance(spelling, ast.Call))


class Rewritten(NamedTuple):
    """A function made anew, and what was found in it, for people."""

    function: types.FunctionType
    found: list[str]


def rewritten(function: types.FunctionType, loads: Loads, recompute: str) -> Rewritten | None:
    """The function with sites, None where it has no place for one. Raises `source.NoSource`."""
    definition = definition_of(function)
    writer = _Writer(function, definition, loads, recompute)
    body = writer.rewritten_body()
    if not writer.found and writer.noted:
        writer.found += gains_of_notes(function, loads, recompute, writer.scales)
    if not writer.found:
        return None
    tree = copy.copy(definition.tree)
    tree.body = body
    return Rewritten(rebuilt(function, definition._replace(tree=tree), writer.cells), writer.found)


def rewritten_method(method: types.FunctionType, loads: Loads, recompute: str) -> Rewritten | None:
    """The same of a method, within its decorators."""
    layers = layers_of(method)
    made = rewritten(layers[-1], loads, recompute)
    if made is None:
        return None
    function, found = made
    return Rewritten(decorated(layers, function), found)


class _Writer:
    def __init__(self, function: types.FunctionType, definition: Definition, loads: Loads, recompute: str) -> None:
        self.scope = Scope(function, definition.tree)
        self.tree = copy.deepcopy(definition.tree)
        self.reader = Reader(loads, self.scope, self.tree)
        self.recompute = recompute
        self.cells: dict[str, Any] = {}
        self.found: list[str] = []
        self.written = set(written_names(self.tree, self.scope))
        # Where outputs are let go of, sums and products are noted, for what is read of them.
        self.notes = recompute != "block"
        self.noted = False
        # Whether a product is noted: one of a norm's output, perhaps, which is made again where that is.
        self.scales = False
        # Statements as they were, which run where a site does not compute; what is found in them is there already.
        self._originals: list[list[ast.stmt]] = []

    def rewritten_body(self) -> list[ast.stmt]:
        for block in list(blocks(self.tree)):
            self._statements(block)
        return [self._expressions(statement) for statement in self.tree.body]

    # Runs of statements

    def _statements(self, block: Block) -> None:
        """Exchanges runs of the block, the largest patterns first, in place."""
        candidates = sorted(self._runs(block), key=lambda c: (c[0], c[1] - c[2]))
        taken: set[int] = set()
        instead: dict[int, tuple[int, ast.stmt]] = {}
        for _, begin, end, made in candidates:
            if not taken & set(range(begin, end + 1)):
                taken |= set(range(begin, end + 1))
                instead[begin] = end, made()
        statements, index = [], 0
        while index < len(block.statements):
            end, statement = instead.get(index, (index, block.statements[index]))
            statements.append(statement)
            index = end + 1
        block.statements[:] = statements

    def _runs(self, block: Block) -> Iterator[tuple[int, int, int, Any]]:
        """(rank of the pattern, first, last, what makes the statement) of each run that something was found in."""
        statements: list[Any] = block.statements
        for end, last in enumerate(statements):
            if not isinstance(last, ast.Assign | ast.AugAssign | ast.Return | ast.Expr) or last.value is None:
                continue
            for begin in range(max(0, end - LONGEST + 1), end):
                run = run_of(self.tree, block, begin, end, self.scope.fast, self._halves)
                if run is None:
                    continue
                first = statements[begin].value
                for root in expressions_in(last.value):
                    if not comes_first(last, root, self.reader.is_plain):
                        continue
                    match = next(matches(self.reader, root, run, first), None)
                    if match is not None:
                        run_statements = block.statements[begin : end + 1]
                        yield _rank(match), begin, end, lambda m=match, s=run_statements: self._run(m, s)
            yield from self._sums(block, end, last)

    def _halves(self, function: ast.expr) -> bool:
        return self.reader.part(function).kind == "halves"

    def _sums(self, block: Block, end: int, last: Any) -> Iterator[tuple[int, int, int, Any]]:
        """A sum that is given a name, and the norm of it in a later statement; between them other names for it."""
        statements: list[Any] = block.statements
        for root in expressions_in(last.value):
            if not isinstance(root, ast.Call) or len(root.args) != 1 or root.keywords:
                continue
            name = root.args[0]
            if (
                not isinstance(name, ast.Name)
                or name.id not in self.scope.fast
                or self.reader.part(root.func).kind != "norm"
            ):
                continue
            begin = end - 1
            while begin >= 0 and copies(block.statements[begin], name.id):
                begin -= 1
            if begin < 0 or not assigns(block.statements[begin], name.id):
                continue
            names = {n.id for s in block.statements[begin:end] for n in ast.walk(s) if isinstance(n, ast.Name)}
            if names & self.written:
                continue
            total = statements[begin].value
            if not comes_first(last, root, self.reader.is_plain):
                continue
            for attempt in attempts(self.reader, total, None, sites.add_norm, _SUMS):
                attempt.operands.append(Operand("norm", root.func))
                attempt.options["total"] = True
                match = settled(self.reader, total, total, sites.add_norm, attempt)
                if match is not None:
                    statements = block.statements[begin : end + 1]
                    yield _rank(match), begin, end, lambda m=match, r=root, s=statements: self._sum(m, r, s)
                    break

    def _run(self, match: Match, statements: Sequence[ast.stmt]) -> ast.stmt:
        *_, last = statements
        return self._either(match, [replaced(last, {id(match.root): taken()})], statements)

    def _sum(self, match: Match, norm: ast.expr, statements: Sequence[ast.stmt]) -> ast.stmt:
        first, *between, last = statements
        computed = [replaced(first, {id(match.root): taken()}), *between, replaced(last, {id(norm): taken()})]
        return self._either(match, computed, statements)

    def _either(self, match: Match, computed: Sequence[ast.stmt], statements: Sequence[ast.stmt]) -> ast.stmt:
        captured = {id(operand.tree): taken() for operand in match.captured}
        original = [replaced(statement, captured) for statement in statements]
        self._originals.append(original)
        made = ast.If(self._asked(match), [*computed], original)
        return ast.copy_location(made, statements[0])

    # Expressions

    def _expressions(self, tree: Any) -> Any:
        """The tree, in which each expression that a site computes is one."""
        if isinstance(tree, list):
            found = len(self.found)
            made_list = [self._expressions(part) for part in tree]
            if any(tree is original for original in self._originals):
                del self.found[found:]
            return made_list
        if not isinstance(tree, ast.AST) or isinstance(tree, (*CLOSED, *_DEFINITIONS)):
            return tree
        if isinstance(tree, ast.BinOp | ast.Call):
            match = next(matches(self.reader, tree, None, tree), None)
            if match is not None:
                return self._expression(match)
        made: Any = with_parts(tree, self._expressions)
        if isinstance(tree, ast.Call) and (part := self.reader.part(tree.func)).kind:
            made.func = self._exchange(tree, part)
            if self.recompute == "layer" and part.kind in IN_LAYERS:
                self.noted = True
                return at(tree, ast.Call(self._cell(watch), [made], []))
        if self.recompute == "layer" and is_picked(tree):
            self.noted = True
            return at(tree, ast.Call(self._cell(watch), [made], []))
        return self._operator(made)

    def _operator(self, tree: Any) -> Any:
        """An operator, noted; anything else as it is."""
        compute = OPERATORS.get(type(tree.op)) if isinstance(tree, ast.BinOp) and self.notes else None
        if compute is None:
            return tree
        self.noted = True
        self.scales = self.scales or isinstance(tree.op, ast.Mult)
        return at(tree, ast.Call(self._cell(noted_operator(compute)), [tree.left, tree.right], []))

    def _expression(self, match: Match) -> ast.expr:
        captured = {id(operand.tree): taken() for operand in match.captured}
        original = self._with_notes(replaced(match.root, captured))
        return ast.copy_location(ast.IfExp(self._asked(match), taken(), original), match.root)

    def _with_notes(self, tree: Any) -> Any:
        """The tree with its operators noted, but without sites: the results of one would replace what was captured."""
        if isinstance(tree, list):
            return [self._with_notes(part) for part in tree]
        if not isinstance(tree, ast.AST) or isinstance(tree, (*CLOSED, *_DEFINITIONS)):
            return tree
        return self._operator(with_parts(tree, self._with_notes))

    def _asked(self, match: Match) -> ast.expr:
        """The call of a site, after that of a quick one if there is one, and whether it has computed."""
        pattern, attempt = match.pattern, match.attempt
        options = attempt.options | (
            {"recompute": level_of_blocks(self.recompute)} if "recompute" in pattern.takes else {}
        )
        captured = [operand.name for operand in match.captured]
        known = attempt.act.known
        if attempt.activation is not None:
            site = templates.site(pattern, captured, options, known, attempt.activation, attempt.act.is_exact)
        else:
            site = templates.site(pattern, captured, options, tried=activation_function(known[0]) if known else None)
        keywords = [ast.keyword(operand.name, self._operand(operand)) for operand in match.operands]
        call = ast.Call(self._cell(site), [], keywords)
        self.found.append(attempt.said(pattern))
        asked = has_computed(call)
        if (quick := quick_site(match, self.scope.self, options)) is not None:
            function, values = quick
            asked = ast.BoolOp(ast.Or(), [has_computed(ast.Call(self._cell(function), values, [])), asked])
        return at(match.root, asked)

    def _operand(self, operand: Operand) -> ast.expr:
        return operand.tree if self.reader.is_plain(operand.tree) else self._expressions(operand.tree)

    def _exchange(self, call: ast.Call, part: Part) -> ast.expr:
        """What is called instead."""
        function = call.func
        if part.kind == "object":
            return self._exchange_object(function, *part.known)
        is_local = part.kind == "local exchange"
        (known,) = part.known or ((self.scope.function_called if is_local else self.scope.value)(function),)
        if self.notes and isinstance(known, FUNCTION_TYPES) and known in FUNCTIONS:
            self.noted = True
            return self._call(function, noted_function(known))
        exchange = exchange_for(known, call, is_local)
        if exchange is None:
            return function
        instead, said = exchange
        self.found.append(said)
        return self._call(function, instead)

    def _exchange_object(self, function: ast.expr, method: types.FunctionType, loads: Any) -> ast.expr:
        try:
            within = rewritten_method(method, dict(loads), self.recompute)
        except NoSource:
            within = None
        if within is None:
            return function
        instead, found = within
        self.found += found
        return self._call(function, exchanged_object(method, instead))

    def _call(self, function: ast.expr, exchange: Any) -> ast.expr:
        """What `exchange` makes of the function that is about to be called."""
        return at(function, ast.Call(self._cell(exchange), [function], []))

    def _cell(self, value: Any) -> ast.expr:
        name = f"{PREFIX}{len(self.cells)}"
        self.cells[name] = value
        return ast.Name(name, ast.Load())


def _rank(match: Match) -> int:
    return sites.PATTERNS.index(match.pattern)
