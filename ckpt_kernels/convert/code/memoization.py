"""Memoization of the analyses of classes and functions.

An analysis resolves names and attributes, which may have other values at the next conversion: methods are patched, and
the code of functions is replaced. Results are therefore kept for one conversion only. Outside conversions nothing is
kept. Results for arguments that hold all that was read, by identity, stay right and are kept longer.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

Result = TypeVar("Result")

_MAX_ENTRIES = 4096
_MISSING: Any = object()
# The results of the present conversion, by function and arguments. Another thread has none, and computes anew.
_results: ContextVar[dict[tuple, Any] | None] = ContextVar("results", default=None)


@contextlib.contextmanager
def shared_results() -> Iterator[None]:
    """A context in which memoized functions keep results, for a conversion or a part of one."""
    if _results.get() is not None:
        yield
        return
    token = _results.set({})
    try:
        yield
    finally:
        _results.reset(token)


def memoized(function: Callable[..., Result]) -> Callable[..., Result]:
    """The function, computed once in a conversion for equal arguments of the same types that can be hashed; exceptions
    are not kept."""

    @functools.wraps(function)
    def call(*arguments: Any) -> Result:
        return _kept(_results.get(), function, arguments)

    return call


def memoized_for_good(function: Callable[..., Result]) -> Callable[..., Result]:
    """The function, computed once for equal arguments of the same types, which must hold all that the function reads,
    by identity.

    Results live as long as the process where the classes and functions in the arguments belong to a file. A class that
    was made at run time, in a function or by other code, must be freed together with the last module of the class, and
    so must the closure of the forward: results about such a class are kept for a conversion.
    """
    lasting: dict[tuple, Result] = {}

    @functools.wraps(function)
    def call(*arguments: Any) -> Result:
        if len(lasting) >= _MAX_ENTRIES:
            lasting.clear()
        return _kept(_results.get() if _is_local(arguments) else lasting, function, arguments)

    return call


def _kept(results: dict[tuple, Any] | None, function: Callable[..., Result], arguments: tuple) -> Result:
    """The result among these, computed if missing."""
    if results is None:
        return function(*arguments)
    key = (function, _with_types(arguments))
    try:
        result = results.get(key, _MISSING)
    except TypeError:  # without a hash, for example a global that has been replaced by a dict
        return function(*arguments)
    if result is _MISSING:
        result = function(*arguments)
        results[key] = result
    return result


def _with_types(value: Any) -> tuple:
    """A key that equals only the keys of values that no code can tell apart: True == 1 == 1.0, and 0.0 == -0.0."""
    if isinstance(value, tuple):
        return (type(value), *map(_with_types, value))
    return type(value), (value.hex() if type(value) is float else value)


def _is_local(value: Any) -> bool:
    """Whether a value is, or a tuple contains, a class that no module has or a function made within a function."""
    if isinstance(value, tuple):
        return any(map(_is_local, value))
    name = getattr(value, "__qualname__", "")
    if "<locals>" in name or not isinstance(value, type):
        return "<locals>" in name
    member: Any = sys.modules.get(value.__module__)
    for part in name.split("."):
        member = getattr(member, part, None)
    return member is not value
