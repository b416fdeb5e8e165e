"""Checks arguments that are no tensors: numbers, flags and names. Each error names the argument, what came and what was
expected."""

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def number(value: float, argument: str) -> float:
    """`value` as a float.

    Numbers of numpy, torch's symbolic numbers and tensors of one element are numbers as well.

    Raises:
        TypeError: `value` is no number, or one beyond the range of a float.
    """
    if isinstance(value, torch.SymInt):
        return float(int(value))
    if isinstance(value, float | int) or hasattr(value, "__float__"):
        try:
            return float(value)
        # Tensors and arrays of several elements, complex ones or without values, and integers beyond the range.
        except (TypeError, ValueError, RuntimeError, OverflowError):
            pass
    raise TypeError(f"{argument} is {shown(value)}; expected a number")


def probability(value: float, argument: str) -> float:
    """`value` as a float; TypeError if it is no number, ValueError if it is outside [0, 1]."""
    p = number(value, argument)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{argument} is {p}; expected a probability between 0 and 1")
    return p


def whole(value: Any, argument: str) -> int:
    """`value` as an int, or as the symbolic integer that it is; TypeError if it is no whole number, which True is not.

    Integers of numpy and tensors of one integer are whole numbers as well.
    """
    is_flag = isinstance(value, bool)
    if isinstance(value, int | torch.SymInt) and not is_flag:
        integer: Any = value
        return integer
    if hasattr(value, "__index__") and not is_flag:
        try:
            return operator.index(value)
        # Tensors and arrays of several elements, or of other dtypes.
        except (TypeError, ValueError, RuntimeError):
            pass
    raise TypeError(f"{argument} is {shown(value)}; expected a whole number")


def size(value: Any, argument: str) -> int:
    """`value` as an int; TypeError if it is no whole number, ValueError if it is negative."""
    found = whole(value, argument)
    if found < 0:
        raise ValueError(f"{argument} is {found}; expected a whole number that is not negative")
    return found


def flag(value: bool, argument: str) -> bool:
    """`value`; TypeError if it is no bool. As torch's functions, this takes no 0 or 1 either."""
    if not isinstance(value, bool):
        raise TypeError(f"{argument} is {shown(value)}; expected a bool")
    return value


def one_of(value: str, names: Iterable[str], argument: str) -> str:
    """`value`; ValueError if it is none of `names`."""
    if not isinstance(value, str) or value not in names:
        raise ValueError(f"{argument} is {shown(value)}; expected one of {', '.join(names)}")
    return value


def is_count(value: object) -> bool:
    """Whether it is a positive int, which True is not."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def count_or_none(value: Any, argument: str) -> int | None:
    """`value` as an int, None as None; ValueError if it is neither a positive whole number nor None."""
    try:
        found = None if value is None else whole(value, argument)
    except TypeError:
        found = 0
    if found is None or found > 0:
        return found
    raise ValueError(f"{argument} is {shown(value)}; expected a positive whole number, or None")


def untraced(value: Any) -> Any:
    """A size that torch.jit.trace follows, which is a tensor, as a number; whatever else as it is."""
    return int(value) if isinstance(value, Tensor) and torch._C._get_tracing_state() is not None else value


def shown(value: object) -> str:
    """The value as an error text shows it: a tensor or an array, which may be large, by its type."""
    is_large = isinstance(value, Tensor) or bool(getattr(value, "shape", ()))
    return f"a {type(value).__name__}" if is_large else repr(value)
