"""The part that a value, a module or a function, can have in a pattern; see `reading.Part`."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...activations import FUNCTIONS as ACTIVATIONS
from ..attribute_loads import load_attribute
from ..rotations.trials import turns_heads
from ..rules.function_trials import activation_function
from ..rules.in_place import writes_over
from ..rules.norms import Norm
from ..rules.pointwise import ActivationRule, activation_of, pointwise_of
from ..swap import original_of, rule_of
from .exchange import EXCHANGES, FUNCTION_TYPES
from .guards import CHUNK, is_linear
from .notes import FUNCTIONS
from .reading import ADAPTED, MODULE, Part


def part_of(value: Any, may_touch: Callable[[nn.Module], bool]) -> Part:
    """The part that a value can have in a pattern."""
    if isinstance(value, nn.Module):
        if not may_touch(value) or isinstance(value, torch.jit.ScriptModule):
            return Part()
        if isinstance(rule_of(value), Norm):
            return Part("norm")
        if original_of(value) is nn.Dropout:
            return Part("dropout")
        if is_linear(value):
            return Part("linear")
        # Which may be taken out again: whether it is there is asked at each call.
        within = load_attribute(value, "base_layer")
        if isinstance(within, nn.Module) and is_linear(within) and may_touch(within):
            return Part("linear", ADAPTED)
        if (name := activation_of(value, made=True)) is not None:
            return Part("act", name)
        if writes_over(value):
            return Part("write")
        is_act = rule_of(value) is None and isinstance(pointwise_of(value)[0], ActivationRule)
        return Part("exchange", known=(value,)) if is_act else Part(MODULE)
    if not isinstance(value, FUNCTION_TYPES):
        return Part()
    if value is F.dropout:
        return Part("F.dropout")
    if value is CHUNK:
        return Part("halves")
    if value in ACTIVATIONS:
        return Part("act", ACTIVATIONS[value])
    if (tried := activation_function(value)) is not None:
        return Part("act", tried.name, not tried.keeps_input, (value,))
    is_exchanged = value in EXCHANGES or value in FUNCTIONS or turns_heads(value)
    return Part("exchange", known=(value,)) if is_exchanged else Part()


def looks_like_mlp(module: nn.Module, may_touch: Callable[[nn.Module], bool]) -> bool:
    """Whether it has, for itself, two linear layers and an activation."""
    parts = [part_of(child, may_touch).kind for child in module._modules.values()]
    return parts.count("linear") >= 2 and "act" in parts
