"""Reading of Python's code objects, closure cells and types."""

import types
from typing import Any


def names_in(code: types.CodeType) -> set[str]:
    """The globals and attributes that code names, nested functions included."""
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*map(names_in, inner))


def cell_value(cell: types.CellType, default: Any = None) -> Any:
    """The value of a closure cell, or the default while the cell is empty."""
    try:
        return cell.cell_contents
    except ValueError:
        return default


def has_type(value: Any, kind: Any) -> bool:
    """`isinstance` by the type alone: reading `__class__` of a lazy object would load the object."""
    return issubclass(type(value), kind)
