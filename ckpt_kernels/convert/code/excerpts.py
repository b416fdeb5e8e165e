"""The lines of one function, and what it takes to compile them without the rest of their file, which may be long.

All of this goes by indentation, by names and by the look of imports, and may be wrong. `source` compiles what is found
here and holds it against the code that runs; where they differ, it reads the whole file.
"""

import ast
import functools
import re
import types
from collections.abc import Sequence
from typing import Any

_CLOSERS = (")", "]", "}")
_LOCALS = "<locals>"
_IMPORT = re.compile(r"import[ \t]+(\([^)]*\)|.*)")
# a, a.b, a as c: what is bound.
_BOUND = re.compile(r"(\w+)[\w.]*(?:[ \t]+as[ \t]+(\w+))?")


def excerpt_of(code: types.CodeType, lines: Sequence[str]) -> str:
    """The lines of a function, in a text where they have the numbers and columns that they have in their file; "" where
    they are not there."""
    first, end = code.co_firstlineno, _last_line(code)
    if not 0 < first <= end <= len(lines):
        return ""
    indent = _indent(lines[first - 1])
    while end < len(lines) and _goes_on(lines[end], indent):
        end += 1
    # What is indented has to stand in something.
    before = "\n" * (first - 2) + "if True:\n" if indent else "\n" * (first - 1)
    return before + "".join(lines[first - 1 : end])


def _last_line(code: types.CodeType) -> int:
    """The last line that something is computed in."""
    own = [line for *_, line in code.co_lines() if line is not None]
    return max([*own, *(_last_line(inner) for inner in code.co_consts if isinstance(inner, types.CodeType))], default=0)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _goes_on(line: str, indent: int) -> bool:
    """Whether what began with that indent has not ended before the line."""
    written = line.strip()
    return not written or written.startswith(("#", *_CLOSERS)) or _indent(line) > indent


def likely_enclosing(qualified: str) -> tuple[ast.stmt, ...]:
    """The classes and functions around a function of that qualified name, from the outermost, with nothing in them."""
    *names, _ = qualified.split(".")
    found: list[ast.stmt] = []
    for name, within in zip(names, (*names, "")[1:], strict=True):
        if name != _LOCALS:
            made: Any = ast.parse("def f(): pass" if within == _LOCALS else "class C: pass").body[0]
            made.name = name
            found.append(made)
    return tuple(found)


def imported_names(code: types.CodeType, text: str) -> tuple[str, ...]:
    """What the code names and the text of its file imports."""
    return tuple(sorted(_imported(text) & _names_in(code)))


@functools.lru_cache(maxsize=64)
def _imported(text: str) -> frozenset[str]:
    imports = (found for found in _IMPORT.finditer(text) if _begins_import(text, found.start()))
    written = (re.sub("#.*", "", found[1]) for found in imports)
    return frozenset(bound[2] or bound[1] for names in written for bound in _BOUND.finditer(names))


def _begins_import(text: str, place: int) -> bool:
    before = text[text.rfind("\n", 0, place) + 1 : place].lstrip()
    return not before or before.startswith("from ")


def _names_in(code: types.CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*map(_names_in, inner))
