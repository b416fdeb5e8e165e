"""Makes a program that fails smaller: leaves out steps and statements as long as it fails in the same way."""

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from .grammar import Program
from .runner import Convert, Result, run


def shrunk(result: Result, folder: Path, convert: Convert, most: int = 400) -> Result:
    """The smallest failing result found in `most` runs."""
    again = True
    while again:
        again = False
        for change in (_without_step, _without_statement, _only_body):
            index = 0
            while (smaller := change(result.program, index)) is not None and most > 0:
                most -= 1
                found = _failing(smaller, result, folder, convert) if smaller != result.program else None
                if found is None:
                    index += 1
                else:
                    result, again = found, most > 0
    return result


def _failing(program: Program, like: Result, folder: Path, convert: Convert) -> Result | None:
    """What comes of it if it fails like that; what eager torch does not run is no smaller program."""
    try:
        found = run(program, like.level, folder, convert)
    except Exception:
        return None
    same = found.differences and _kind(found) == _kind(like) and len(found.raised) <= len(like.raised)
    return found if same else None


def _kind(result: Result) -> str:
    """What differed first, without where and by how much."""
    return result.differences[0].partition("[")[0].partition(":")[0]


def _without_step(program: Program, index: int) -> Program | None:
    """The program without one of its steps; None where there is no such step. So are those below, by statement."""
    if index >= len(program.steps):
        return None
    return dataclasses.replace(program, steps=(*program.steps[:index], *program.steps[index + 1 :]))


def _without_statement(program: Program, index: int) -> Program | None:
    tree = ast.parse(program.source)
    for body, place in _place(tree, index):
        if not isinstance(body[place], ast.Pass):
            body[place : place + 1] = [] if len(body) > 1 else [ast.Pass()]
        return dataclasses.replace(program, source=ast.unparse(tree))
    return None


def _only_body(program: Program, index: int) -> Program | None:
    """What a compound statement holds, in its place."""
    tree = ast.parse(program.source)
    for body, place in _place(tree, index):
        if isinstance(body[place], ast.If | ast.With | ast.For | ast.Try | ast.While):
            body[place : place + 1] = body[place].body
        return dataclasses.replace(program, source=ast.unparse(tree))
    return None


def _place(tree: ast.AST, index: int) -> Iterator[tuple[list[ast.stmt], int]]:
    """Where the statement of that number is, the outermost first: a list of statements and its place; or nothing."""
    for node in ast.walk(tree):
        for name in ("body", "orelse", "finalbody"):
            body = getattr(node, name, None)
            if isinstance(body, list):
                if index < len(body):
                    yield body, index
                    return
                index -= len(body)
