"""Makes a failing program smaller: removes steps and statements as long as the failure stays the same."""

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from .grammar import Program
from .runner import Convert, Result, run


def shrunk(result: Result, folder: Path, convert: Convert, most: int = 400) -> Result:
    """The smallest failing result found in `most` runs."""
    is_smaller = True
    while is_smaller:
        is_smaller = False
        for change in (_without_step, _without_statement, _only_body):
            index = 0
            while (smaller := change(result.program, index)) is not None and most > 0:
                most -= 1
                found = _failing(smaller, result, folder, convert) if smaller != result.program else None
                if found is None:
                    index += 1
                else:
                    result, is_smaller = found, most > 0
    return result


def _failing(program: Program, like: Result, folder: Path, convert: Convert) -> Result | None:
    """The result of the program if it fails in the same way; None if not, or if eager torch raises other errors."""
    try:
        found = run(program, like.level, folder, convert)
    except Exception:
        return None
    same = found.differences and _kind(found) == _kind(like) and len(found.raised) <= len(like.raised)
    return found if same else None


def _kind(result: Result) -> str:
    """The first difference, without place and magnitude."""
    return result.differences[0].partition("[")[0].partition(":")[0]


def _without_step(program: Program, index: int) -> Program | None:
    """The program without one step; None if there is no step of this index. Statements below likewise."""
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
    """The program with the body of a compound statement in place of the statement."""
    tree = ast.parse(program.source)
    for body, place in _place(tree, index):
        if isinstance(body[place], ast.If | ast.With | ast.For | ast.Try | ast.While):
            body[place : place + 1] = body[place].body
        return dataclasses.replace(program, source=ast.unparse(tree))
    return None


def _place(tree: ast.AST, index: int) -> Iterator[tuple[list[ast.stmt], int]]:
    """The list that holds the statement of this index, outermost first, and the position there; or nothing."""
    for node in ast.walk(tree):
        for name in ("body", "orelse", "finalbody"):
            body = getattr(node, name, None)
            if isinstance(body, list):
                if index < len(body):
                    yield body, index
                    return
                index -= len(body)
