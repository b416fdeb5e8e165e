"""Fusion of consecutive modules in `nn.Sequential`: a rule whose forward makes one fused call for several children."""

import ast
import collections
import itertools
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


def _chain_patterns() -> Iterator[tuple[Pattern, tuple[str, ...]]]:
    """The patterns that are chains of calls, with the names of the callees, innermost first."""
    for pattern in fused_patterns.PATTERNS:
        for tree in pattern.spellings:
            names: list[str] = []
            while isinstance(tree, ast.Call) and callee(tree) != "formula":
                names.insert(0, callee(tree))
                tree = tree.args[0]
            if names and isinstance(tree, ast.Name):
                yield pattern, tuple(names)


# Longer chains first.
_PATTERNS = tuple(sorted(_chain_patterns(), key=lambda chain: -len(chain[1])))
_FORWARD, _ITER = nn.Sequential.forward, nn.Sequential.__iter__
_ARE_UNPATCHED = is_unpatched(_FORWARD) and is_unpatched(_ITER)


@dataclass(frozen=True)
class SequentialRule(Rule):
    """The rule of a sequence of `length` modules.

    `places` has for each child the index into `_PATTERNS` of the chain that begins there, or -1.
    """

    length: int
    places: tuple[int, ...]
    recompute: str

    def methods(self, original: type[nn.Module]) -> Mapping[str, Callable[..., Any]]:
        patterns = {place: _PATTERNS[place][0] for place in self.places if place >= 0}
        recompute = {"recompute": self.recompute}
        calls = {
            place: guarded_call(pattern, (), recompute if "recompute" in pattern.parameters else {})
            for place, pattern in patterns.items()
        }
        return {"forward": lambda module, input: self._forward(original, module, input, calls)}

    def _forward(
        self, original: Any, module: nn.Module, input: Any, calls: Mapping[int, Callable[..., list[Any]]]
    ) -> Any:
        if len(module._modules) != self.length or original.__iter__ is not _ITER:
            return original.forward(module, input)
        # A child may exchange a later one in its forward, so each is taken when its turn comes, as by Sequential.
        children: Iterator[Any] = iter(module._modules.values())
        index = 0
        while index < self.length:
            place, length = self.places[index], 1
            results = [False]
            if place >= 0 and len(module._modules) == self.length:
                names = _PATTERNS[place][1]
                length = len(names)
                group = itertools.islice(module._modules.values(), index, index + length)
                results = calls[place](**dict(zip(names, group, strict=True)), input=input)
            index += length
            turn = itertools.islice(children, length)
            if results.pop():
                input = results.pop()
                collections.deque(turn, maxlen=0)
                continue
            for child in turn:
                input = child(input)
        for child in children:  # an error of the iterator if the number of children changed
            input = child(input)
        return input

    def __str__(self) -> str:
        return "; ".join(_PATTERNS[index][0].description for index in self.places if index >= 0)


def sequential_rule(module: nn.Module, recompute: str, may_touch: Callable[[nn.Module], bool]) -> SequentialRule | None:
    """The rule of a sequence, or None if no chain of its children can be fused."""
    kind: Any = type(module)
    if not _ARE_UNPATCHED or kind.forward is not _FORWARD or kind.__iter__ is not _ITER:
        return None
    roles = [role_of(child, may_touch) for child in module._modules.values()]
    places: list[int] = []
    while len(places) < len(roles):
        rest = roles[len(places) :]
        index = next((i for i, (pattern, names) in enumerate(_PATTERNS) if _begins(rest, pattern, names)), -1)
        length = len(_PATTERNS[index][1]) if index >= 0 else 1
        # The last linear layer of one MLP may be the first of the next: the first fused call gets the layer.
        places += [index, *[-1] * (length - 1)]
    return SequentialRule(len(roles), tuple(places), recompute) if any(index >= 0 for index in places) else None


def _begins(roles: Sequence[Role], pattern: Pattern, names: tuple[str, ...]) -> bool:
    """Whether a sequence begins with the callees of a pattern, and the fused call saves memory."""
    kinds = tuple(kind_of(name) for name in names)
    saves = pattern.makes_act_input or roles[0].name not in KEPT_BY_OUTPUT
    return tuple(role.kind for role in roles[: len(names)]) == kinds and saves
