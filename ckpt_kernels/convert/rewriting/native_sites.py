"""What a rewritten method asks before a site, in the usual case: one call of C, which loads the operands too, and the
function that computes. Where C does not know all of it the operands are loaded as they are written, and the site asks.

Only for sites whose operands are plain loads: what is loaded twice is the same, and nobody can tell.
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
from .reader import Match
from .templates import Pattern, keeps

_is_compiling = torch.compiler.is_compiling
# A function that gives the results and True, or False.
Quick = Callable[..., list[Any]]


def native_site(match: Match, owner: str, options: dict[str, Any]) -> tuple[Quick, list[ast.expr]] | None:
    """The function, and what it is given: `owner`, which is the name of the module, in the place of the operands that
    are its attributes, and the others. None where C would never know."""
    if match.captured or match.attempt.activation is not None or match.attempt.act.known:
        return None
    operands = {operand.name: operand.tree for operand in match.operands}
    loads = {name: _attribute(tree, owner) for name, tree in operands.items()}
    names = {name: attribute for name, attribute in loads.items() if attribute}
    given = [name for name in operands if name not in names]
    values = [ast.Name(owner, ast.Load())] * bool(names) + [operands[name] for name in given]
    places: dict[str, int | str] = {name: place for place, name in enumerate(given, len(values) - len(given))}
    call = native_call(match.pattern, {**places, **names}, options)
    return None if call is None else (call, values)


def native_call(pattern: Pattern, places: Mapping[str, int | str], options: dict[str, Any]) -> Quick | None:
    """The function, by the places of its operands among the values, or their names in the first of these."""
    letters = dict.fromkeys(pattern.tensors, "t") | dict.fromkeys(pattern.linears, "l") | {"act": "o"}
    has_act = "activation" in pattern.takes
    if not places.keys() <= letters.keys() or has_act != ("act" in places):
        return None
    wanted = [(places[name], letters[name]) for name in pattern.takes if name in places]
    wanted += [(places["act"], "a")] if has_act else []
    constants = pattern.options | options
    known = (
        NATIVE_ACTIVATIONS
        if keeps(pattern, constants)
        else tuple(each for each in NATIVE_ACTIVATIONS if not _is_kept_by_output(each[1]))
    )
    attributes = tuple(place for place in places.values() if isinstance(place, str))
    owner = ModuleGuard(nn.Module, LOADS_PLAINLY, (), attributes, (), ())
    native_check = SiteGuard(GLOBAL_STATE, owner, LINEAR, known, tuple(wanted)).native_check()
    if native_check is None:
        return None
    compute, fixed = pattern.compute, constants | ({"p": 0.0} if "p" in pattern.takes else {})

    def call(*values: Any) -> list[Any]:
        found = None if _is_compiling() else native_check(*values)
        results = None if found is None else compute(*found, **fixed)
        if results is None:
            return [False]
        results.append(True)
        return results

    return call


def _is_kept_by_output(known: str | ActivationGuard) -> bool:
    return (known if isinstance(known, str) else known.name) in KEPT_BY_OUTPUT


def _attribute(tree: ast.expr, owner: str) -> str:
    """The name of an attribute of `owner`, if the expression is one and the name no class's own."""
    if not isinstance(tree, ast.Attribute) or not isinstance(tree.value, ast.Name) or tree.value.id != owner:
        return ""
    return "" if tree.attr.startswith("__") else tree.attr
