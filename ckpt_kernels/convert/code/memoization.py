"""Memoization of the analyses of classes and functions.

Results live as long as the process where the class or function belongs to a file. A class that was made at run time, in
a function or by other code, must be freed together with the last module of the class, and so must the closure of the
forward: results about such a class are forgotten when the conversion ends.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")

_MAX_ENTRIES = 4096
_local_caches: list[dict[tuple, Any]] = []


def memoized(function: Callable[..., Result]) -> Callable[..., Result]:
    """The function, computed once for equal arguments that can be hashed; exceptions are not cached."""
    lasting: dict[tuple, Result] = {}
    local: dict[tuple, Result] = {}
    _local_caches.append(local)

    @functools.wraps(function)
    def call(*arguments: Any) -> Result:
        cache = local if _is_local(arguments) else lasting
        try:
            hash(arguments)
        except TypeError:  # for example a global that has been replaced by a dict
            return function(*arguments)
        if arguments not in cache:
            if len(cache) >= _MAX_ENTRIES:
                cache.clear()
            cache[arguments] = function(*arguments)
        return cache[arguments]

    return call


def forget_local_results() -> None:
    """Forget results about local classes and functions, at the end of a conversion."""
    for cache in _local_caches:
        cache.clear()


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
