"""Sequences of modules (`nn.Sequential`), in which what belongs together is computed by one call."""

import ast
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..code.call_graph import is_unpatched
from ..rules.pointwise import KEPT_BY_OUTPUT
from ..rules.rule import Rule
from . import fused_patterns
from .roles import Role, role_of
from .templates import Pattern, callee, guarded_call, kind_of


def _chains() -> Iterator[tuple[Pattern, tuple[str, ...]]]:
    """The patterns that are one call within another, with the names of what is called, the first one first."""
    for pattern in fused_patterns.PATTERNS:
        for tree in pattern.spellings:
            names: list[str] = []
            while isinstance(tree, ast.Call) and callee(tree) != "formula":
                names.insert(0, callee(tree))
                tree = tree.args[0]
            if names and isinstance(tree, ast.Name):
                yield pattern, tuple(names)


# Longer ones first.
_PATTERNS = tuple(sorted(_chains(), key=lambda chain: -len(chain[1])))
_SEQUENTIAL, _ITER = nn.Sequential.forward, nn.Sequential.__iter__
_ARE_TORCHS = is_unpatched(_SEQUENTIAL) and is_unpatched(_ITER)


@dataclass(frozen=True)
class SequentialRule(Rule):
    """Where in a sequence of `length` modules something begins: an index into `_PATTERNS` for each place, or -1."""

    length: int
    places: tuple[int, ...]
    recompute: str

    def methods(self, original: type[nn.Module]) -> Mapping[str, Callable[..., Any]]:
        patterns = {place: _PATTERNS[place][0] for place in self.places if place >= 0}
        recompute = {"recompute": self.recompute}
        made = {
            place: guarded_call(pattern, (), recompute if "recompute" in pattern.takes else {})
            for place, pattern in patterns.items()
        }
        return {"forward": lambda module, input: self._forward(original, module, input, made)}

    def _forward(
        self, original: Any, module: nn.Module, input: Any, made: Mapping[int, Callable[..., list[Any]]]
    ) -> Any:
        modules: list[Any] = list(module._modules.values())
        if len(modules) != self.length or original.__iter__ is not _ITER:
            return original.forward(module, input)
        for place, several in _steps(modules, self.places):
            results = [False]
            if place >= 0:
                names = _PATTERNS[place][1]
                results = made[place](**dict(zip(names, several, strict=True)), input=input)
            if results.pop():
                input = results.pop()
                continue
            for each in several:
                input = each(input)
        return input

    def __str__(self) -> str:
        return "; ".join(_PATTERNS[index][0].said for index in self.places if index >= 0)


def sequential_rule(module: nn.Module, recompute: str, may_touch: Callable[[nn.Module], bool]) -> SequentialRule | None:
    """What can be computed by one call in a sequence."""
    kind: Any = type(module)
    if not _ARE_TORCHS or kind.forward is not _SEQUENTIAL or kind.__iter__ is not _ITER:
        return None
    parts = [role_of(child, may_touch) for child in module._modules.values()]
    places: list[int] = []
    while len(places) < len(parts):
        here = parts[len(places) :]
        found = next((i for i, (pattern, names) in enumerate(_PATTERNS) if _begins(here, pattern, names)), -1)
        length = len(_PATTERNS[found][1]) if found >= 0 else 1
        # A product at the end of one MLP may be the beginning of the next: one call has it.
        places += [found, *[-1] * (length - 1)]
    return SequentialRule(len(parts), tuple(places), recompute) if any(index >= 0 for index in places) else None


def _begins(parts: Sequence[Role], pattern: Pattern, names: tuple[str, ...]) -> bool:
    """Whether the parts begin with what the pattern calls, and there is something to win."""
    kinds = tuple(kind_of(name) for name in names)
    won = pattern.made or parts[0].name not in KEPT_BY_OUTPUT
    return tuple(part.kind for part in parts[: len(names)]) == kinds and won


def _steps(modules: list[nn.Module], places: tuple[int, ...]) -> Iterator[tuple[int, list[nn.Module]]]:
    index = 0
    while index < len(modules):
        length = len(_PATTERNS[places[index]][1]) if places[index] >= 0 else 1
        yield places[index], modules[index : index + length]
        index += length
