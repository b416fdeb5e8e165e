"""The part that a value, a module or a function, can have in a pattern; see `reading.Role`."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ...activations import FUNCTIONS as ACTIVATIONS
from ..attribute_loads import load_attribute
from ..rotations.recognition import is_rotation
from ..rules.function_trials import activation_function
from ..rules.in_place import writes_over
from ..rules.norms import Norm
from ..rules.pointwise import ActivationRule, activation_of, pointwise_of
from ..swap import original_of, rule_of
from .guards import CHUNK, is_linear
from .noted_operations import FUNCTIONS
from .replacements import FUNCTION_TYPES, REPLACEMENTS

# Of a linear layer with an adapter around it.
ADAPTED = "adapted"
# The kind of a module that is none of the others.
MODULE = "module"


class Role(NamedTuple):
    """What a load in a method can be in a pattern: "linear", "act", "norm", "dropout", "F.dropout", "halves" (which is
    torch.chunk), "exchange", "module", which is any other, "noted", which no load is but
    whose name says why the method's operators are noted (see `gains`), or "", which is any other plain load.

    A "linear" may have an adapter around it by now, as its name says.
    An "act", which may be a formula too, has the activation's name, and is `of_new` if it counts only where what it is
    of has just been computed: torch does not keep that for it, so that somebody else may write to it. `known` are the
    functions and numbers that a formula was known with, a function that is an "act" by itself, and the module or
    function that an "exchange" is of. A formula is not `is_exact` where its numbers are rounded, which float64 can
    tell.
    """

    kind: str = ""
    name: str = ""
    of_new: bool = False
    known: tuple[Any, ...] = ()
    is_exact: bool = True


# The part of each load and formula in a method, by its text.
Roles = Mapping[str, Role]


def may_match_any(parts: Iterable[tuple[str, Role]], recompute: str = "output") -> bool:
    """Whether anything may be found with them. Modules that are nothing to us count in layers alone."""
    kinds = {part.kind for _, part in parts} - {""}
    return bool(kinds if recompute == "layer" else kinds - {MODULE})


def role_of(value: Any, may_touch: Callable[[nn.Module], bool]) -> Role:
    """The part that a value can have in a pattern."""
    if isinstance(value, nn.Module):
        if not may_touch(value) or isinstance(value, torch.jit.ScriptModule):
            return Role()
        if isinstance(rule_of(value), Norm):
            return Role("norm")
        if original_of(value) is nn.Dropout:
            return Role("dropout")
        if is_linear(value):
            return Role("linear")
        # Which may be taken out again: whether it is there is asked at each call.
        within = load_attribute(value, "base_layer")
        if isinstance(within, nn.Module) and is_linear(within) and may_touch(within):
            return Role("linear", ADAPTED)
        if (name := activation_of(value, made=True)) is not None:
            return Role("act", name)
        if writes_over(value):
            return Role("write")
        is_act = rule_of(value) is None and isinstance(pointwise_of(value)[0], ActivationRule)
        return Role("exchange", known=(value,)) if is_act else Role(MODULE)
    if not isinstance(value, FUNCTION_TYPES):
        return Role()
    if value is F.dropout:
        return Role("F.dropout")
    if value is CHUNK:
        return Role("halves")
    if value in ACTIVATIONS:
        return Role("act", ACTIVATIONS[value])
    if (tried := activation_function(value)) is not None:
        return Role("act", tried.name, not tried.keeps_input, (value,))
    is_exchanged = value in REPLACEMENTS or value in FUNCTIONS or is_rotation(value)
    return Role("exchange", known=(value,)) if is_exchanged else Role()


def looks_like_mlp(module: nn.Module, may_touch: Callable[[nn.Module], bool]) -> bool:
    """Whether it has, for itself, two linear layers and an activation."""
    parts = [role_of(child, may_touch).kind for child in module._modules.values()]
    return parts.count("linear") >= 2 and "act" in parts
