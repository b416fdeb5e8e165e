"""The contents of lists, dicts and sets among the attributes of a layer's modules, which a repeated call changes again.

A layer may append a loss to a list, or keep a map of attention in a dict. The contents before the first call are not
held, because they may hold graphs; a repeated call finds what is there then, and its changes are undone.
"""

import collections
import operator
from collections.abc import Iterator, Sequence
from typing import Any

# How deep containers may nest.
_DEPTH = 3
_LISTS = (list, collections.deque)
_DICTS = (dict, collections.OrderedDict, collections.defaultdict)
_KINDS = frozenset({*_LISTS, *_DICTS, set})


class Contents:
    """What the containers among the values of these dicts hold, and the containers in them."""

    __slots__ = ("_copies",)

    def __init__(self, dicts: Sequence[dict[str, Any]]) -> None:
        found: dict[int, Any] = {}
        for values in dicts:
            for value in values.values():
                if type(value) in _KINDS:
                    found.update((id(inside), inside) for inside in _with_inner(value, _DEPTH))
        self._copies = [(container, container.copy()) for container in found.values()]

    def restore(self) -> None:
        """Give the containers these contents."""
        for container, before in self._copies:
            if _is_same(container, before):
                continue
            container.clear()
            (container.extend if type(container) in _LISTS else container.update)(before)


def _with_inner(container: Any, depth: int) -> Iterator[Any]:
    yield container
    if depth > 1 and type(container) is not set:
        for value in container.values() if type(container) in _DICTS else container:
            if type(value) in _KINDS:
                yield from _with_inner(value, depth - 1)


def _is_same(now: Any, before: Any) -> bool:
    """Whether a container holds the same objects, in the same order."""
    if len(now) != len(before):
        return False
    if type(now) is set:
        return now == before
    if type(now) in _DICTS and not all(map(operator.is_, now.values(), before.values())):
        return False
    return all(map(operator.is_, now, before))
