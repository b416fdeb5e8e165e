"""A method with calls of `sites` in the place of what they compute, and everything else as it was written.

An expression becomes `results.pop() if (results := site(...)).pop() else expression`, and a run of statements

    if (results := site(...)).pop(): the last statement, with results.pop() for what was computed
    else: the statements as they were written

What the site is given is evaluated once and in the order in which it was written.
"""

import ast
import copy
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from . import sites, templates
from .called import is_a, is_torchs, names_in
from .exchange import EXCHANGES, exchanged, exchanged_module
from .flow import CLOSED, LONGEST, Block, blocks, run_of
from .order import comes_first
from .patterns import attempts, matches
from .pointwise import ActivationRule, pointwise_of
from .reading import Loads, Match, Operand, Part, Reader, settled
from .rotation_trials import exchanged_rotation, rotation_of
from .scope import Scope
from .source import Definition, definition_of, rebuilt
from .writes import written_names

# Of the names that are new in a function.
_PREFIX = "_ckpt_kernels_"
_RESULTS = f"{_PREFIX}results"
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
# A function that looks at its own frame sees what it is made of.
_LOOKS = frozenset(("locals", "vars", "eval", "exec", "dir", "_getframe", "currentframe", "stack"))
_LOOKS_OUT = frozenset(("_getframe", "currentframe", "f_back", "f_locals"))
_PLAIN_FLAGS = 0x20 | 0x80 | 0x100 | 0x200  # generators and coroutines

# The sum in a norm of one.
_SUMS = tuple(spelling.args[0] for spelling in sites.add_norm.spellings if isinstance(spelling, ast.Call))


class Rewritten(NamedTuple):
    """A function made anew, and what was found in it, for people."""

    function: types.FunctionType
    found: list[str]


def may_be_rewritten(function: types.FunctionType) -> bool:
    """Whether what is in its frame is nobody's affair but its own, and the new names are new."""
    code = function.__code__
    names = {*code.co_names, *code.co_varnames, *code.co_cellvars, *code.co_freevars}
    if any(name.startswith(_PREFIX) for name in names):
        return False
    called = (function.__globals__.get(name) for name in code.co_names)
    return not (_LOOKS & names or code.co_flags & _PLAIN_FLAGS or any(map(_looks_out, called)))


def _looks_out(function: Any) -> bool:
    """Whether a function looks at the frame that calls it."""
    if not is_a(function, types.FunctionType) or is_torchs(function):
        return False
    names = names_in(function.__code__)
    return bool(_LOOKS_OUT & names) or {"inspect", "stack"} <= names


def rewritten(function: types.FunctionType, loads: Loads, recompute: str) -> Rewritten | None:
    """The function with sites, None where it has no place for one. Raises `source.NoSource`."""
    definition = definition_of(function)
    writer = _Writer(function, definition, loads, recompute)
    body = writer.rewritten_body()
    if not writer.found:
        return None
    tree = copy.copy(definition.tree)
    tree.body = body
    return Rewritten(rebuilt(function, definition._replace(tree=tree), writer.cells), writer.found)


class _Writer:
    def __init__(self, function: types.FunctionType, definition: Definition, loads: Loads, recompute: str) -> None:
        self.scope = Scope(function, definition.tree)
        self.tree = definition.tree
        self.reader = Reader(loads, self.scope, definition.tree)
        self.recompute = recompute
        self.cells: dict[str, Any] = {}
        self.found: list[str] = []
        self.written = set(written_names(definition.tree))
        self._changed: set[int] = set()
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
                for root in _parts(last.value):
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
        for root in _parts(last.value):
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
            while begin >= 0 and _copies(block.statements[begin], name.id):
                begin -= 1
            if begin < 0 or not _assigns(block.statements[begin], name.id):
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
        return self._either(match, [_exchanged(last, {id(match.root): _taken()})], statements)

    def _sum(self, match: Match, norm: ast.expr, statements: Sequence[ast.stmt]) -> ast.stmt:
        first, *between, last = statements
        computed = [_exchanged(first, {id(match.root): _taken()}), *between, _exchanged(last, {id(norm): _taken()})]
        return self._either(match, computed, statements)

    def _either(self, match: Match, computed: Sequence[ast.stmt], statements: Sequence[ast.stmt]) -> ast.stmt:
        captured = {id(operand.tree): _taken() for operand in match.captured}
        original = [_exchanged(statement, captured) for statement in statements]
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
        made: Any = _with_parts(tree, self._expressions)
        if isinstance(tree, ast.Call) and (part := self.reader.part(tree.func)).kind:
            made.func = self._exchange(tree.func, part)
        return made

    def _expression(self, match: Match) -> ast.expr:
        captured = {id(operand.tree): _taken() for operand in match.captured}
        original = _exchanged(match.root, captured)
        return ast.copy_location(ast.IfExp(self._asked(match), _taken(), original), match.root)

    def _asked(self, match: Match) -> ast.expr:
        """The call of a site, and whether it has computed."""
        pattern, attempt = match.pattern, match.attempt
        options = attempt.options | ({"recompute": self.recompute} if "recompute" in pattern.takes else {})
        captured = [operand.name for operand in match.captured]
        site = templates.site(pattern, captured, options, attempt.act.known, attempt.activation, attempt.act.is_exact)
        keywords = [ast.keyword(operand.name, self._operand(operand)) for operand in match.operands]
        call = ast.Call(self._cell(site), [], keywords)
        named = ast.NamedExpr(ast.Name(_RESULTS, ast.Store()), call)
        self.found.append(attempt.said(pattern))
        return _at(match.root, ast.Call(ast.Attribute(named, "pop", ast.Load()), [], []))

    def _operand(self, operand: Operand) -> ast.expr:
        return operand.tree if self.reader.is_plain(operand.tree) else self._expressions(operand.tree)

    def _exchange(self, function: ast.expr, part: Part) -> ast.expr:
        (known,) = part.known or (self.scope.value(function),)
        if isinstance(known, nn.Module) and isinstance(rule := pointwise_of(known)[0], ActivationRule):
            self.found.append(str(rule))
            return _at(function, ast.Call(self._cell(exchanged_module(known, rule)), [function], []))
        if not isinstance(known, types.FunctionType | types.BuiltinFunctionType):
            return function
        if known in EXCHANGES:
            instead, said = exchanged(known), known.__name__
        elif isinstance(known, types.FunctionType) and rotation_of(known) is not None:
            instead, said = exchanged_rotation(known), "rotary"
        else:
            return function
        self.found.append(said)
        return _at(function, ast.Call(self._cell(instead), [function], []))

    def _cell(self, value: Any) -> ast.expr:
        name = f"{_PREFIX}{len(self.cells)}"
        self.cells[name] = value
        return ast.Name(name, ast.Load())


def _rank(match: Match) -> int:
    return sites.PATTERNS.index(match.pattern)


def _taken() -> ast.expr:
    """The next of the results."""
    return ast.Call(ast.Attribute(ast.Name(_RESULTS, ast.Load()), "pop", ast.Load()), [], [])


def _at(place: ast.AST, tree: ast.expr) -> ast.expr:
    """The tree, all that is new in it at that place of the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.expr | ast.keyword) and not hasattr(node, "lineno"):
            ast.copy_location(node, place)
    return tree


def _with_parts(tree: ast.AST, change: Any) -> ast.AST:
    """A copy of the node, each of its parts changed."""
    made = copy.copy(tree)
    for name, value in ast.iter_fields(tree):
        if isinstance(value, ast.AST | list):
            setattr(made, name, change(value))
    return made


def _exchanged(tree: Any, instead: Mapping[int, ast.expr]) -> Any:
    """A copy of the tree with other expressions in the place of those with these ids."""
    if isinstance(tree, list):
        return [_exchanged(part, instead) for part in tree]
    if not isinstance(tree, ast.AST):
        return tree
    if id(tree) in instead:
        return _at(tree, instead[id(tree)])
    return _with_parts(tree, lambda part: _exchanged(part, instead))


def _parts(tree: ast.AST) -> Iterator[ast.expr]:
    """The expressions in a tree, from the outermost, that a pattern may begin with."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call | ast.BinOp):
            yield node


def _assigns(statement: ast.stmt, name: str) -> bool:
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return False
    target = statement.targets[0]
    return isinstance(target, ast.Name) and target.id == name


def _copies(statement: ast.stmt, name: str) -> bool:
    """Another name for what has that name."""
    if not isinstance(statement, ast.Assign) or not isinstance(statement.value, ast.Name):
        return False
    targets = [target.id for target in statement.targets if isinstance(target, ast.Name)]
    return statement.value.id == name and len(targets) == len(statement.targets) and name not in targets
