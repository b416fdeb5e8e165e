"""What a conversion finds out of a class or a function is remembered.

For good, if that lives as long as its file. A class that was made at run time, in a function or by another's code, and
what its forward closes over, is to be freed with its last module: what is known of it is forgotten when the conversion
ends.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

Found = TypeVar("Found")

_MOST = 4096
_for_now: list[dict[tuple, Any]] = []


def memoized(function: Callable[..., Found]) -> Callable[..., Found]:
    """The function, which computes once for arguments that are equal and can be hashed; exceptions are not
    remembered."""
    for_good: dict[tuple, Found] = {}
    for_now: dict[tuple, Found] = {}
    _for_now.append(for_now)

    @functools.wraps(function)
    def call(*arguments: Any) -> Found:
        known = for_now if _is_local(arguments) else for_good
        try:
            hash(arguments)
        except TypeError:  # a global that is no module any more, say
            return function(*arguments)
        if arguments not in known:
            if len(known) >= _MOST:
                known.clear()
            known[arguments] = function(*arguments)
        return known[arguments]

    return call


def forget_local_results() -> None:
    """At the end of a conversion."""
    for known in _for_now:
        known.clear()


def _is_local(value: Any) -> bool:
    """Whether a class in it is in no module, or a function in it was made within a function."""
    if isinstance(value, tuple):
        return any(map(_is_local, value))
    name = getattr(value, "__qualname__", "")
    if "<locals>" in name or not isinstance(value, type):
        return "<locals>" in name
    found: Any = sys.modules.get(value.__module__)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is not value
