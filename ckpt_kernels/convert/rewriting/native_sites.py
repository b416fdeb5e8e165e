"""Call sites whose guards run in C: one native call loads and checks the operands, then the fused op runs.

Where the native guard cannot decide, the operands are loaded as written, and the guards in Python run. Only sites whose
operands are all plain loads have a native guard: loading them twice has no side effects.
"""

import ast
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..attribute_loads import LOADS_PLAINLY
from ..native_guards import ActivationGuard, ModuleGuard, SiteGuard
from ..operands import GLOBAL_STATE
from ..rules.pointwise import KEPT_BY_OUTPUT, NATIVE_ACTIVATIONS
from .guards import LINEAR
from .matching import Match
from .templates import Pattern, eager_saves_act_input

_is_compiling = torch.compiler.is_compiling


# The activations for which eager torch saves the input.
_KNOWN_BY_INPUT = tuple(
    (act, known)
    for act, known in NATIVE_ACTIVATIONS
    if (known.name if isinstance(known, ActivationGuard) else known) not in KEPT_BY_OUTPUT
)
# A function that returns the results and True, or False.
NativeCall = Callable[..., list[Any]]


def native_site(match: Match, owner: str, options: dict[str, Any]) -> tuple[NativeCall, list[ast.expr]] | None:
    """The native call of a site with its argument expressions; None if the native guard would never succeed.

    The name `owner` of the module stands for all operands that are attributes of the module.
    """
    if match.captured or match.attempt.act.kind == "formula" or match.attempt.act.values:
        return None
    operands = {operand.name: operand.tree for operand in match.operands}
    attributes = {name: attribute for name, tree in operands.items() if (attribute := _attribute(tree, owner))}
    others = [name for name in operands if name not in attributes]
    values = [ast.Name(owner, ast.Load())] * bool(attributes) + [operands[name] for name in others]
    places: dict[str, int | str] = {name: place for place, name in enumerate(others, len(values) - len(others))}
    call = native_call(match.pattern, {**places, **attributes}, options)
    return None if call is None else (call, values)


def native_call(pattern: Pattern, places: Mapping[str, int | str], options: dict[str, Any]) -> NativeCall | None:
    """The native call of a pattern, None without one.

    `places` has for each operand the index of an argument, or the name of an attribute of the first argument.
    """
    letters = dict.fromkeys(pattern.tensors, "t") | dict.fromkeys(pattern.linears, "l") | {"act": "o"}
    has_act = "activation" in pattern.parameters
    if not places.keys() <= letters.keys() or has_act != ("act" in places):
        return None
    wanted = [(places[name], letters[name]) for name in pattern.parameters if name in places]
    wanted += [(places["act"], "a")] if has_act else []
    constants = pattern.options | options
    known = NATIVE_ACTIVATIONS if eager_saves_act_input(pattern, constants) else _KNOWN_BY_INPUT
    attributes = tuple(place for place in places.values() if isinstance(place, str))
    owner = ModuleGuard(nn.Module, LOADS_PLAINLY, (), attributes, (), ())
    native_check = SiteGuard(GLOBAL_STATE, owner, LINEAR, known, tuple(wanted)).native_check()
    if native_check is None:
        return None
    compute, fixed = pattern.compute, constants | ({"p": 0.0} if "p" in pattern.parameters else {})

    def call(*values: Any) -> list[Any]:
        operands = None if _is_compiling() else native_check(*values)
        results = None if operands is None else compute(*operands, **fixed)
        if results is None:
            return [False]
        results.append(True)
        return results

    return call


def _attribute(tree: ast.expr, owner: str) -> str:
    """The name of the attribute, if the expression loads an attribute of `owner` other than a dunder; else ""."""
    if not isinstance(tree, ast.Attribute) or not isinstance(tree.value, ast.Name) or tree.value.id != owner:
        return ""
    return "" if tree.attr.startswith("__") else tree.attr
