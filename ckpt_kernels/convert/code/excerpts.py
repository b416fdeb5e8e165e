"""The source lines of one function, and what is needed to compile them without the rest of a long file.

All of this is a guess from indentation, names and the look of import statements. `source` compiles the guess and
compares the result with the code that runs; where they differ, `source` parses the whole file.
"""

import ast
import functools
import re
import types
from collections.abc import Sequence
from typing import Any

from .code_objects import names_in

_CLOSERS = (")", "]", "}")
_LOCALS = "<locals>"
_IMPORT = re.compile(r"import[ \t]+(\([^)]*\)|.*)")
# `a`, `a.b` or `a as c`, with the name that is bound.
_BOUND = re.compile(r"(\w+)[\w.]*(?:[ \t]+as[ \t]+(\w+))?")


def excerpt_of(code: types.CodeType, lines: Sequence[str]) -> str:
    """The lines of a function at their line numbers and columns in the file; "" if the file does not have them."""
    first, end = code.co_firstlineno, _last_line(code)
    if not 0 < first <= end <= len(lines):
        return ""
    indent = _indent(lines[first - 1])
    while end < len(lines) and _continues(lines[end], indent):
        end += 1
    # Indented lines need a statement around them.
    before = "\n" * (first - 2) + "if True:\n" if indent else "\n" * (first - 1)
    return before + "".join(lines[first - 1 : end])


def _last_line(code: types.CodeType) -> int:
    """The last line that has an instruction."""
    own = [line for *_, line in code.co_lines() if line is not None]
    return max([*own, *(_last_line(inner) for inner in code.co_consts if isinstance(inner, types.CodeType))], default=0)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _continues(line: str, indent: int) -> bool:
    """Whether a line belongs to a definition that began with that indent."""
    stripped = line.strip()
    return not stripped or stripped.startswith(("#", *_CLOSERS)) or _indent(line) > indent


def likely_enclosing(qualified_name: str) -> tuple[ast.stmt, ...]:
    """Empty definitions of the classes and functions around a function of that qualified name, outermost first."""
    *names, _ = qualified_name.split(".")
    enclosing: list[ast.stmt] = []
    for name, following in zip(names, (*names, "")[1:], strict=True):
        if name != _LOCALS:
            definition: Any = ast.parse("def f(): pass" if following == _LOCALS else "class C: pass").body[0]
            definition.name = name
            enclosing.append(definition)
    return tuple(enclosing)


def imported_names(code: types.CodeType, text: str) -> tuple[str, ...]:
    """The names in the code that the text of its file imports."""
    return tuple(sorted(_imported(text) & names_in(code)))


@functools.lru_cache(maxsize=64)
def _imported(text: str) -> frozenset[str]:
    imports = (found for found in _IMPORT.finditer(text) if _begins_import(text, found.start()))
    clauses = (re.sub("#.*", "", found[1]) for found in imports)
    return frozenset(bound[2] or bound[1] for clause in clauses for bound in _BOUND.finditer(clause))


def _begins_import(text: str, place: int) -> bool:
    """Whether `import` at that place is a keyword at the start of a line or after `from module`."""
    before = text[text.rfind("\n", 0, place) + 1 : place].lstrip()
    return not before or before.startswith("from ")
