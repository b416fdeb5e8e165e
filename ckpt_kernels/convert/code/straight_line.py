"""Straight runs of statements: what their names stand for, and whether a name is needed afterwards."""

import ast
from collections.abc import Callable, Iterator
from typing import NamedTuple

from .evaluation_order import count_uses, first_use, loaded_names

# Nothing is looked for within these, nor in a run that has one: their insides run elsewhere, later, or not at all.
OPAQUE = (
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
MAX_RUN_LENGTH = 8


class Half(NamedTuple):
    """Half of the dimension `dim` of a tensor, and the function that halves it, None where that is a method."""

    tensor: ast.expr
    number: int
    function: ast.expr | None
    dim: int


Binding = ast.expr | Half


class Block(NamedTuple):
    """Statements that follow one another; `whole` if they are the function's own body, `within` if a `with` is around
    them, which may end an error."""

    statements: list[ast.stmt]
    whole: bool
    within: bool


class Run(NamedTuple):
    """Statements `begin` to `end`, both included, of a block. `bindings`: what the names that one of them reads and an
    earlier one makes stand for, by the id of the node that reads."""

    begin: int
    end: int
    bindings: dict[int, Binding]


def blocks(function: ast.FunctionDef) -> Iterator[Block]:
    """All blocks of a function but those within `try`, where an error in the middle of a run would be seen."""
    waiting = [Block(function.body, True, False)]
    while waiting:
        block = waiting.pop()
        yield block
        for statement in block.statements:
            if isinstance(statement, ast.If | ast.For | ast.While | ast.With):
                within = block.within or isinstance(statement, ast.With)
                waiting.append(Block(statement.body, False, within))
                if not isinstance(statement, ast.With):
                    waiting.append(Block(statement.orelse, False, within))


def run_between(
    function: ast.FunctionDef,
    block: Block,
    begin: int,
    end: int,
    fast: frozenset[str],
    halves: Callable[[ast.expr], bool],
) -> Run | None:
    """The run, if each of its statements but the last does nothing but make one value, or two halves, which are read
    in the run, and nobody else needs what these are called. `halves`: what is torch.chunk."""
    read: set[int] = set()
    bindings: dict[int, Binding] = {}
    current: dict[str, tuple[int, Binding]] = {}
    made = 0
    names = [dict(_made(statement, halves)) for statement in block.statements[begin:end]]
    if not all(found and found.keys() <= fast for found in names):
        return None
    for index, statement in enumerate(block.statements[begin : end + 1]):
        if any(isinstance(node, (*OPAQUE, *_DEFINITIONS)) for node in ast.walk(statement)):
            return None
        for node in loaded_names(statement):
            if node.id in current:
                number, bindings[id(node)] = current[node.id]
                read.add(number)
        for name, meaning in names[index].items() if index < len(names) else ():
            current[name] = made, meaning
            made += 1
    if len(read) != made:
        return None
    if not all(is_dead(name, function, block, begin, end) for name in current):
        return None
    return Run(begin, end, bindings)


def _made(statement: ast.stmt, halves: Callable[[ast.expr], bool]) -> Iterator[tuple[str, Binding]]:
    """The names that a statement gives values, and these."""
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return
    target = statement.targets[0]
    if isinstance(target, ast.Name):
        yield target.id, statement.value
    elif isinstance(target, ast.Tuple) and len(target.elts) == 2:
        whole = chunked_in_two(statement.value, halves)
        names = [name.id for name in target.elts if isinstance(name, ast.Name)]
        if whole is not None and len(set(names)) == 2:
            yield from ((name, Half(whole[0], index, whole[1], whole[2])) for index, name in enumerate(names))


def chunked_in_two(tree: ast.expr, halves: Callable[[ast.expr], bool]) -> tuple[ast.expr, ast.expr | None, int] | None:
    """x, of x.chunk(2, -1), and of torch.chunk(x, 2, -1), whatever that is called here, with the function; and -1, or
    another dimension, which may be the last."""
    if not isinstance(tree, ast.Call):
        return None
    function = tree.func if halves(tree.func) else None
    if function is not None:
        arguments = [*tree.args]
    elif isinstance(tree.func, ast.Attribute) and tree.func.attr == "chunk":
        arguments = [tree.func.value, *tree.args]
    else:
        return None
    named = dict(zip(("input", "chunks", "dim"), arguments, strict=False))
    named |= {keyword.arg or "**": keyword.value for keyword in tree.keywords}
    if named.keys() != {"input", "chunks", "dim"} or isinstance(named["input"], ast.Starred):
        return None
    chunks, dim = (ast.unparse(named[name]) for name in ("chunks", "dim"))
    if len(arguments) + len(tree.keywords) != 3 or chunks != "2" or not (dim == "-1" or dim.isdecimal()):
        return None
    return named["input"], function, int(dim)


def is_dead(name: str, function: ast.FunctionDef, block: Block, begin: int, end: int) -> bool:
    """Whether nobody reads, after the run, what it has given that name."""
    if sum(count_uses(s, name) for s in block.statements[begin : end + 1]) == count_uses(function, name):
        return True
    if block.within:
        return False
    last = block.statements[end]
    if isinstance(last, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in last.targets):
        return True
    for statement in block.statements[end + 1 :]:
        used = first_use(statement, name)
        if used:
            return used == "stored"
        if not block.whole and any(isinstance(node, ast.Break | ast.Continue) for node in ast.walk(statement)):
            return False
    return block.whole
