"""The contents of lists, dicts and sets among the attributes of a layer's modules, which a repeated call changes again.

A layer may append a loss to a list, or keep a map of attention in a dict. The contents before the first call are not
held, because they may hold graphs; a repeated call finds what is there then, and its changes are undone.
"""

import collections
import operator
from collections.abc import Sequence
from typing import Any

_LISTS = (list, collections.deque)
_DICTS = (dict, collections.OrderedDict, collections.defaultdict, collections.Counter)
_CHANGEABLE = frozenset({*_LISTS, *_DICTS, set})
_KINDS = frozenset({*_CHANGEABLE, tuple})


class Contents:
    """What the containers among the values of these dicts hold, and the containers in them."""

    __slots__ = ("_copies",)

    def __init__(self, dicts: Sequence[dict[str, Any]]) -> None:
        waiting = [value for values in dicts for value in values.values() if type(value) in _KINDS]
        found: dict[int, Any] = {}
        while waiting:
            container = waiting.pop()
            if id(container) not in found:  # a list may contain itself
                found[id(container)] = container
                parts = container.values() if type(container) in _DICTS else container
                waiting += [part for part in parts if type(part) in _KINDS]
        self._copies = [(found_one, found_one.copy()) for found_one in found.values() if type(found_one) in _CHANGEABLE]

    def restore(self) -> None:
        """Give the containers these contents."""
        for container, before in self._copies:
            if _is_same(container, before):
                continue
            container.clear()
            (container.extend if type(container) in _LISTS else container.update)(before)


def _is_same(now: Any, before: Any) -> bool:
    """Whether a container holds the same objects, in the same order."""
    if len(now) != len(before):
        return False
    if type(now) is set:
        return now == before
    if type(now) in _DICTS and not all(map(operator.is_, now.values(), before.values())):
        return False
    return all(map(operator.is_, now, before))
