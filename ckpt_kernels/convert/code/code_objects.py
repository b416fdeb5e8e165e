"""Reading of Python's code objects, closure cells and types."""

import contextlib
import dis
import importlib.util
import types
from collections.abc import Iterator
from typing import Any

_IMPORT = dis.opmap["IMPORT_NAME"]


def names_in(code: types.CodeType) -> set[str]:
    """The globals and attributes that code names, nested functions included."""
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*map(names_in, inner))


def imports_in(code: types.CodeType, package: str | None) -> Iterator[str]:
    """The absolute names of the modules that code of a package imports, nested functions included."""
    steps = []
    if _IMPORT in code.co_code[::2]:
        steps = [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]
    for place, step in enumerate(steps):
        if step.opname != "IMPORT_NAME":
            continue
        level, names = (steps[place - back].argval for back in (2, 1))
        with contextlib.suppress(ImportError):
            base = importlib.util.resolve_name("." * level + step.argval, package)
            yield base
            yield from (f"{base}.{name}" for name in names or ())
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from imports_in(constant, package)


def cell_value(cell: types.CellType, default: Any = None) -> Any:
    """The value of a closure cell, or the default while the cell is empty."""
    try:
        return cell.cell_contents
    except ValueError:
        return default


def has_type(value: Any, kind: Any) -> bool:
    """`isinstance` by the type alone: reading `__class__` of a lazy object would load the object."""
    return issubclass(type(value), kind)
