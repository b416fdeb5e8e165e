"""Snapshots of the code that a trial depends on, so that each call can check that the code is unchanged."""

import contextlib
import types
from collections.abc import Callable, Iterable
from typing import Any

from ..native_guards import Binding, are_same
from .code_objects import has_type
from .settings import PLAIN_TYPES


class NotTriable(Exception):
    """The reason, for people, why a module cannot be tried out."""


class CodeSnapshot:
    """The dependencies of a forward, each with the value at the time of the trial.

    Dependencies are globals, functions of torch's modules, methods of a class, closure variables, and defaults.
    `helpers` are the names of the methods that the code finds in the class: an instance must not have these names.

    A deep copy is the same object. Unpickling takes the snapshot anew by `again`. A snapshot that then differs is never
    the same, and neither is one without `again`.
    """

    def __init__(
        self,
        dependencies: Iterable[Binding],
        helpers: Iterable[str] = (),
        again: "Callable[[], CodeSnapshot] | None" = None,
    ) -> None:
        self._again = again
        self.helpers = tuple(sorted(helpers))
        unique = {(id(holder), name): (holder, name, value) for holder, name, value in dependencies}
        self.dependencies = tuple(unique.values())

    def is_same(self) -> bool:
        """Whether all dependencies still have these values."""
        return are_same(self.dependencies)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CodeSnapshot) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple:
        return tuple((id(holder), name, id(value)) for holder, name, value in self.dependencies)

    def __deepcopy__(self, memo: dict[int, Any]) -> "CodeSnapshot":
        return self

    def __reduce__(self) -> tuple:
        return _restored, (self._again, self.text())

    def text(self) -> tuple[str, ...]:
        """The dependencies as text that another process can compare: code of functions, plain values, other names."""
        return tuple(f"{name}: {_text(value)}" for _, name, value in self.dependencies)


def _text(value: Any) -> str:
    if has_type(value, types.FunctionType):
        return _text(value.__code__)
    if has_type(value, types.CodeType):
        inner = [_text(constant) for constant in value.co_consts]
        return f"{value.co_code.hex()} {value.co_names} {inner}"
    if has_type(value, tuple):
        return str([_text(part) for part in value])
    return repr(value) if type(value) in PLAIN_TYPES else getattr(value, "__qualname__", type(value).__qualname__)


def _restored(again: Callable[[], CodeSnapshot] | None, text: tuple[str, ...]) -> CodeSnapshot:
    """The snapshot taken in this process, if the text is the same."""
    with contextlib.suppress(NotTriable):
        snapshot = None if again is None else again()
        if snapshot is not None and snapshot.text() == text:
            return snapshot
    # The empty dict has no such item: the snapshot is never the same.
    return CodeSnapshot([({}, "", None)], again=again)


def has_finalizer(kind: type) -> bool:
    """Whether the class runs code when an object is destroyed, a trial's copy included."""
    return hasattr(kind, "__del__")
