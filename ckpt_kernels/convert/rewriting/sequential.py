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
    """The rule of a sequence of modules, in groups.

    `groups` has for each group the index into `_PATTERNS` of the chain that its modules are, or -1 for a module alone,
    and the number of modules.
    """

    groups: tuple[tuple[int, int], ...]
    recompute: str

    def methods(self, original: type[nn.Module]) -> Mapping[str, Callable[..., Any]]:
        patterns = {index: _PATTERNS[index][0] for index, _ in self.groups if index >= 0}
        recompute = {"recompute": self.recompute}
        calls = {
            index: guarded_call(pattern, (), recompute if "recompute" in pattern.parameters else {})
            for index, pattern in patterns.items()
        }
        count = sum(length for _, length in self.groups)
        return {"forward": lambda module, input: self._forward(original, count, calls, module, input)}

    def _forward(
        self, original: Any, count: int, calls: Mapping[int, Callable[..., list[Any]]], module: nn.Module, input: Any
    ) -> Any:
        if len(module._modules) != count or original.__iter__ is not _ITER:
            return original.forward(module, input)
        # A child may exchange a later one in its forward, so each is taken when its turn comes, as by Sequential.
        children: Iterator[Any] = iter(module._modules.values())
        begin = 0
        for index, length in self.groups:
            results = [False]
            if index >= 0 and len(module._modules) == count:
                group = itertools.islice(module._modules.values(), begin, begin + length)
                results = calls[index](**dict(zip(_PATTERNS[index][1], group, strict=True)), input=input)
            begin += length
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
        return "; ".join(_PATTERNS[index][0].description for index, _ in self.groups if index >= 0)


def sequential_rule(module: nn.Module, recompute: str, may_touch: Callable[[nn.Module], bool]) -> SequentialRule | None:
    """The rule of a sequence, or None if no chain of its children can be fused."""
    kind: Any = type(module)
    if not _ARE_UNPATCHED or kind.forward is not _FORWARD or kind.__iter__ is not _ITER:
        return None
    roles = [role_of(child, may_touch) for child in module._modules.values()]
    groups: list[tuple[int, int]] = []
    while roles:
        index = next((i for i, (pattern, names) in enumerate(_PATTERNS) if _begins(roles, pattern, names)), -1)
        # The last linear layer of one MLP may be the first of the next: the first fused call gets the layer.
        groups.append((index, len(_PATTERNS[index][1]) if index >= 0 else 1))
        roles = roles[groups[-1][1] :]
    return SequentialRule(tuple(groups), recompute) if any(index >= 0 for index, _ in groups) else None


def _begins(roles: Sequence[Role], pattern: Pattern, names: tuple[str, ...]) -> bool:
    """Whether a sequence begins with the callees of a pattern, and the fused call saves memory."""
    kinds = tuple(kind_of(name) for name in names)
    saves = pattern.makes_act_input or roles[0].name not in KEPT_BY_OUTPUT
    return tuple(role.kind for role in roles[: len(names)]) == kinds and saves
