"""Roles: what a load in a method, such as `self.fc1` or `F.gelu`, can be in a pattern."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ...activations import FUNCTIONS as ACTIVATIONS
from ...levels import runs_layers_again
from ..attribute_loads import load_attribute
from ..code.code_objects import has_type
from ..code.straight_line import CHUNK
from ..rotations.recognition import is_rotation
from ..rules.activation_trials import (
    TriedFunction,
    TriedMethod,
    activation_function,
    activation_method,
    settings_of_method,
)
from ..rules.gates import gate_of_function
from ..rules.in_place import writes_over
from ..rules.norms import Norm
from ..rules.pointwise import ActivationRule, activation_of, pointwise_of
from ..swap import original_of, rule_of
from .guards import is_linear
from .noted_operations import NOTED_FUNCTIONS
from .replacements import FUNCTION_TYPES, REPLACEMENTS
from .super_norms import norm_with_forward

# The name in the role of a linear layer with an adapter around it.
ADAPTED = "adapted"
# The kind of a module that has no other role.
MODULE = "module"
# The kind of a method that computes a gate of the halves of its argument.
GATE = "gate"
# The kind of a run of statements that computes such a gate.
GATE_RUN = "gate run"
# The kind of `super().forward` in a subclass of a norm of torch.
SUPER_NORM = "super norm"


class Role(NamedTuple):
    """The role of a load or a formula in a method.

    Kinds of loads, and their values:

    linear             a linear layer; its name is ADAPTED if an adapter is around the layer
    act                an activation, by name. One that a trial recognised has values: the function; or of a method the
                       class, the name and the settings
    norm, dropout      a module
    F.dropout          the function
    write              a module, an activation of torch that writes over the input
    halves             `torch.chunk`
    replacement        a callee with a replacement. Value: the module or function
    local replacement  the same for a nested function, without a value
    object             a callable object. Values: the `__call__` of its class, and the roles in that
    super norm         `super().forward`, that of a norm of torch. Value: the function
    module             any other module
    (empty)            any other plain load

    Kinds without a load:

    formula            an activation, by name. Values: the functions and numbers in the formula
    noted              the operators of the method are noted, for the reason in the name (see `note_reasons`)
    gate               the method is a gate. Values: those of the `rules.gates.GateOutline`
    gate run           a run of statements is a gate. Values: the module's class, and the `GateOutline`

    `needs_computed_input`: the activation matches only if the pattern also computes its input: eager torch does not
    save that input, so that a user may write to an input which exists outside. `is_exact`: whether the numbers in a
    formula hold in float64; rounded ones do not.
    """

    kind: str = ""
    name: str = ""
    needs_computed_input: bool = False
    values: tuple[Any, ...] = ()
    is_exact: bool = True


# The role of each load and formula in a method, by the source text; as pairs, which can be hashed and pickled.
Roles = Mapping[str, Role]
MethodRoles = tuple[tuple[str, Role], ...]


def may_match_any(roles: Iterable[tuple[str, Role]], recompute: str = "output") -> bool:
    """Whether any rewrite is possible with these roles. The role "module" counts only for the level "layer"."""
    kinds = {role.kind for _, role in roles} - {""}
    return bool(kinds if runs_layers_again(recompute) else kinds - {MODULE})


def role_of(value: Any, may_touch: Callable[[nn.Module], bool]) -> Role:
    """The role of a module or a function. `may_touch` tells which modules the conversion covers."""
    if has_type(value, nn.Module):
        if not may_touch(value) or isinstance(value, torch.jit.ScriptModule):
            return Role()
        if isinstance(rule_of(value), Norm):
            return Role("norm")
        if original_of(value) is nn.Dropout:
            return Role("dropout")
        if is_linear(value):
            return Role("linear")
        # The adapter may be removed later: guards check the module at each call.
        base = load_attribute(value, "base_layer")
        if has_type(base, nn.Module) and is_linear(base) and may_touch(base):
            return Role("linear", ADAPTED)
        if (name := activation_of(value, made=True)) is not None:
            return Role("act", name)
        if writes_over(value):
            return Role("write")
        is_act = rule_of(value) is None and isinstance(pointwise_of(value)[0], ActivationRule)
        return Role("replacement", values=(value,)) if is_act else Role(MODULE)
    if not has_type(value, FUNCTION_TYPES):
        return Role()
    if norm_with_forward(value) is not None:
        return Role(SUPER_NORM, values=(value,))
    if value is F.dropout:
        return Role("F.dropout")
    if value is CHUNK:
        return Role("halves")
    if value in ACTIVATIONS:
        return Role("act", ACTIVATIONS[value])
    if (tried := activation_function(value)) is not None:
        return Role("act", tried.result.name or "", not tried.result.keeps_input, (value,))
    is_replaced = value in REPLACEMENTS or value in NOTED_FUNCTIONS or is_rotation(value)
    is_replaced = is_replaced or gate_of_function(value) is not None
    return Role("replacement", values=(value,)) if is_replaced else Role()


def role_of_method(module: nn.Module, name: str) -> Role:
    """The role of an attribute of the module that is a method, an activation if a trial shows one."""
    settings = settings_of_method(module, name)
    tried = None if settings is None else activation_method(type(module), name, settings)
    if tried is None:
        return Role()
    return Role("act", tried.result.name or "", not tried.result.keeps_input, (type(module), name, settings))


def tried_act(role: Role) -> TriedFunction | TriedMethod | None:
    """The trial by which a function or a method has the role of an activation; None for other roles."""
    if role.kind != "act" or not role.values:
        return None
    return activation_function(*role.values) if len(role.values) == 1 else activation_method(*role.values)


def looks_like_mlp(module: nn.Module, may_touch: Callable[[nn.Module], bool]) -> bool:
    """Whether a module has two linear layers and an activation among its children."""
    kinds = [role_of(child, may_touch).kind for child in module._modules.values()]
    return kinds.count("linear") >= 2 and "act" in kinds
