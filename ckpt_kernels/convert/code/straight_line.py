"""Straight-line runs of statements: reaching definitions of their names, and liveness of the names afterwards."""

import ast
from collections.abc import Iterator
from typing import NamedTuple

import torch

from .evaluation_order import count_uses, first_use, loaded_names
from .scope import Scope
from .syntax_trees import is_name

# Nodes whose insides are not analysed, as they run elsewhere, later, or not at all. A run contains none of them.
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
# As it was when this package was imported: a user may patch it later.
CHUNK = torch.chunk
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
# The largest number of statements in a run.
_MAX_LENGTH = 8


class Half(NamedTuple):
    """One half of a tensor along `dim`, of `torch.chunk(tensor, 2, dim)` or `tensor.chunk(2, dim)`.

    `number` is 0 or 1, and `function` the expression for `torch.chunk`, or None for the method.
    """

    tensor: ast.expr
    number: int
    function: ast.expr | None
    dim: int


# What an assignment binds a name to.
Binding = ast.expr | Half


class Block(NamedTuple):
    """A list of consecutive statements. `is_body`: whether they are the function's body; `in_with`: whether a `with`
    statement is around them, which may swallow an exception; `in_loop`: whether they may run again in the same call."""

    statements: list[ast.stmt]
    is_body: bool
    in_with: bool
    in_loop: bool


class Run(NamedTuple):
    """The statements `begin` to `end`, both included, of a block.

    `bindings` has the binding for each read of a name that an earlier statement of the run binds, by the id of the node
    that reads.
    """

    begin: int
    end: int
    bindings: dict[int, Binding]


def blocks(function: ast.FunctionDef) -> Iterator[Block]:
    """All blocks of a function except those within `try`, whose handlers would see an exception amid a run."""
    waiting = [Block(function.body, True, False, False)]
    while waiting:
        block = waiting.pop()
        yield block
        for statement in block.statements:
            if isinstance(statement, ast.If | ast.For | ast.While | ast.With):
                in_with = block.in_with or isinstance(statement, ast.With)
                in_loop = block.in_loop or isinstance(statement, ast.For | ast.While)
                waiting.append(Block(statement.body, False, in_with, in_loop))
                if not isinstance(statement, ast.With):
                    waiting.append(Block(statement.orelse, False, in_with, block.in_loop))


def runs_ending_at(function: ast.FunctionDef, block: Block, end: int, scope: Scope) -> Iterator[Run]:
    """The runs of two and more statements that end at a statement of a block, longer ones first.

    All statements of a run but the last only bind private local names that are read in the run and dead after the run:
    one to a value, or two to the halves of a tensor.
    """
    for begin in range(max(0, end - _MAX_LENGTH + 1), end):
        run = _run_between(function, block, begin, end, scope)
        if run is not None:
            yield run


def _run_between(function: ast.FunctionDef, block: Block, begin: int, end: int, scope: Scope) -> Run | None:
    """The run from `begin` to `end`, None if the statements are no run."""
    read: set[int] = set()
    bindings: dict[int, Binding] = {}
    current: dict[str, tuple[int, Binding]] = {}
    count = 0
    bound = [dict(_bindings(statement, scope)) for statement in block.statements[begin:end]]
    if not all(names and names.keys() <= scope.private_locals for names in bound):
        return None
    for index, statement in enumerate(block.statements[begin : end + 1]):
        if any(isinstance(node, (*OPAQUE, *_DEFINITIONS)) for node in ast.walk(statement)):
            return None
        for node in loaded_names(statement):
            if node.id in current:
                number, bindings[id(node)] = current[node.id]
                read.add(number)
        for name, binding in bound[index].items() if index < len(bound) else ():
            current[name] = count, binding
            count += 1
    if len(read) != count:
        return None
    if not all(is_dead(name, function, block, begin, end) for name in current):
        return None
    return Run(begin, end, bindings)


def _bindings(statement: ast.stmt, scope: Scope) -> Iterator[tuple[str, Binding]]:
    """The names that an assignment binds, with their bindings."""
    if not isinstance(statement, ast.Assign) or not (names := bound_names(statement)):
        return
    if len(names) == 1:
        yield names[0], statement.value
    else:
        yield from zip(names, _halves(statement.value, scope), strict=False)


def bound_names(statement: ast.stmt) -> list[str]:
    """The names that an assignment binds: one, or two to the items of a pair; [] for other statements."""
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return []
    target = statement.targets[0]
    parts = target.elts if isinstance(target, ast.Tuple) and len(target.elts) == 2 else [target]
    names = [part.id for part in parts if isinstance(part, ast.Name)]
    return names if len(set(names)) == len(parts) else []


def _halves(tree: ast.expr, scope: Scope) -> tuple[Half, ...]:
    """The halves of x in `x.chunk(2, dim)` or `torch.chunk(x, 2, dim)`; () for any other expression.

    `dim` is written as -1 or as a number that may be the last dimension's.
    """
    if not isinstance(tree, ast.Call):
        return ()
    function = tree.func if scope.value(tree.func) is CHUNK else None
    if function is not None:
        arguments = [*tree.args]
    elif isinstance(tree.func, ast.Attribute) and tree.func.attr == "chunk":
        arguments = [tree.func.value, *tree.args]
    else:
        return ()
    named = dict(zip(("input", "chunks", "dim"), arguments, strict=False))
    named |= {keyword.arg or "**": keyword.value for keyword in tree.keywords}
    if named.keys() != {"input", "chunks", "dim"} or isinstance(named["input"], ast.Starred):
        return ()
    chunks, dim = (ast.unparse(named[name]) for name in ("chunks", "dim"))
    if len(arguments) + len(tree.keywords) != 3 or chunks != "2" or not (dim == "-1" or dim.isdecimal()):
        return ()
    return tuple(Half(named["input"], number, function, int(dim)) for number in (0, 1))


def is_dead(name: str, function: ast.FunctionDef, block: Block, begin: int, end: int) -> bool:
    """Whether no code reads, after the run, the value that the run binds a name to."""
    run = block.statements[begin : end + 1]
    if sum(count_uses(s, name) for s in run) == count_uses(function, name):
        # In a loop the run may begin with a read of an argument that the run itself bound the last time.
        first = next(filter(None, (first_use(s, name) for s in run)), None)
        if first == "stored" or not block.in_loop:
            return True
    if block.in_with:
        return False
    last = block.statements[end]
    if isinstance(last, ast.Return):
        return True
    if isinstance(last, ast.Assign) and any(is_name(target, (name,)) for target in last.targets):
        return True
    for statement in block.statements[end + 1 :]:
        use = first_use(statement, name)
        if use:
            return use == "stored"
        if isinstance(statement, ast.Return):
            return True
        if not block.is_body and any(isinstance(node, ast.Break | ast.Continue) for node in ast.walk(statement)):
            return False
    return block.is_body
