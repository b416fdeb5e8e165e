"""Straight runs of statements: what their names stand for, and whether a name is needed afterwards."""

import ast
from collections.abc import Callable, Iterator
from typing import NamedTuple

# Nothing is looked for within these, nor in a run that has one: their insides run elsewhere, later, or not at all.
CLOSED = (
    ast.Lambda,
    ast.ListComp,
    ast.SetComp,
    ast.DictComp,
    ast.GeneratorExp,
    ast.NamedExpr,
    ast.Await,
    ast.Yield,
    ast.YieldFrom,
    ast.JoinedStr,
)
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
# A run may be no longer than this.
LONGEST = 8


class Half(NamedTuple):
    """Half of the last dimension of a tensor."""

    tensor: ast.expr
    number: int


Meaning = ast.expr | Half


class Block(NamedTuple):
    """Statements that follow one another; `whole` if they are the function's own body."""

    statements: list[ast.stmt]
    whole: bool


class Run(NamedTuple):
    """Statements `begin` to `end`, both included, of a block. `meanings`: what the names that one of them reads and an
    earlier one makes stand for, by the id of the node that reads."""

    begin: int
    end: int
    meanings: dict[int, Meaning]
    made: int


def blocks(function: ast.FunctionDef) -> Iterator[Block]:
    """All blocks of a function but those within `try`, where an error in the middle of a run would be seen."""
    waiting = [Block(function.body, True)]
    while waiting:
        block = waiting.pop()
        yield block
        for statement in block.statements:
            if isinstance(statement, ast.If | ast.For | ast.While | ast.With):
                waiting.append(Block(statement.body, False))
                if not isinstance(statement, ast.With):
                    waiting.append(Block(statement.orelse, False))


def run_of(function: ast.FunctionDef, block: Block, begin: int, end: int, fast: frozenset[str]) -> Run | None:
    """The run, if each of its statements but the last does nothing but make one value, or two halves, for one reader
    in the run, and nobody else needs what these are called."""
    readers: dict[int, int] = {}
    meanings: dict[int, Meaning] = {}
    current: dict[str, tuple[int, Meaning]] = {}
    made = 0
    for statement in block.statements[begin : end + 1]:
        if any(isinstance(node, (*CLOSED, *_DEFINITIONS)) for node in ast.walk(statement)):
            return None
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and node.id in current:
                if not isinstance(node.ctx, ast.Load):
                    continue
                number, meanings[id(node)] = current[node.id]
                readers[number] = readers.get(number, 0) + 1
        if statement is block.statements[end]:
            break
        found = dict(_made(statement))
        if not found or not found.keys() <= fast:
            return None
        for name, meaning in found.items():
            current[name] = made, meaning
            made += 1
    if readers != dict.fromkeys(range(made), 1):
        return None
    if not all(is_dead(name, function, block, begin, end) for name in current):
        return None
    return Run(begin, end, meanings, made)


def _made(statement: ast.stmt) -> Iterator[tuple[str, Meaning]]:
    """The names that a statement gives values, and these."""
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return
    target = statement.targets[0]
    if isinstance(target, ast.Name):
        yield target.id, statement.value
    elif isinstance(target, ast.Tuple) and len(target.elts) == 2 and (whole := halved(statement.value)) is not None:
        names = [name.id for name in target.elts if isinstance(name, ast.Name)]
        if len(set(names)) == 2:
            yield from ((name, Half(whole, index)) for index, name in enumerate(names))


def halved(tree: ast.expr) -> ast.expr | None:
    """x, of x.chunk(2, -1) or torch.chunk(x, 2, -1)."""
    if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Attribute) or tree.func.attr != "chunk":
        return None
    of_torch = isinstance(tree.func.value, ast.Name) and tree.func.value.id == "torch"
    arguments = [*tree.args] if of_torch else [tree.func.value, *tree.args]
    named = dict(zip(("input", "chunks", "dim"), arguments, strict=False))
    named |= {keyword.arg or "**": keyword.value for keyword in tree.keywords}
    if named.keys() != {"input", "chunks", "dim"} or isinstance(named["input"], ast.Starred):
        return None
    texts = [ast.unparse(named[name]) for name in ("chunks", "dim")]
    return named["input"] if texts == ["2", "-1"] else None


def is_dead(name: str, function: ast.FunctionDef, block: Block, begin: int, end: int) -> bool:
    """Whether nobody reads, after the run, what it has given that name."""
    last = block.statements[end]
    if _overwrites(last, name):
        return True
    for statement in block.statements[end + 1 :]:
        if _overwrites(statement, name) and not _mentions(_value(statement), name):
            return True
        if _mentions(statement, name):
            return False
    if block.whole:
        return True
    within = sum(_mentions(statement, name) for statement in block.statements[begin : end + 1])
    return _mentions(function, name) == within


def _value(statement: ast.stmt) -> ast.AST:
    return statement.value if isinstance(statement, ast.Assign) else statement


def _overwrites(statement: ast.stmt, name: str) -> bool:
    if not isinstance(statement, ast.Assign):
        return False
    return any(isinstance(target, ast.Name) and target.id == name for target in statement.targets)


def _mentions(tree: ast.AST, name: str) -> int:
    return sum(isinstance(node, ast.Name) and node.id == name for node in ast.walk(tree))


def comes_first(tree: ast.AST, wanted: ast.AST, is_plain: Callable[[ast.expr], bool]) -> bool:
    """Whether all that is evaluated before `wanted`, which is part of `tree`, are plain loads, or calls around it."""
    if tree is wanted:
        return True
    if isinstance(tree, ast.Call):
        parts = [tree.func, *tree.args, *(keyword.value for keyword in tree.keywords)]
    elif isinstance(tree, ast.BinOp):
        parts = [tree.left, tree.right]
    elif isinstance(tree, ast.Tuple | ast.List):
        parts = list(tree.elts)
    elif isinstance(tree, ast.Attribute | ast.Subscript | ast.Starred):
        parts = [tree.value]
    elif isinstance(tree, ast.UnaryOp):
        parts = [tree.operand]
    else:
        return False
    for part in parts:
        if any(node is wanted for node in ast.walk(part)):
            return comes_first(part, wanted, is_plain)
        if not is_plain(part):
            return False
    return False
