"""Calls of `super().forward` in subclasses of torch's norms, such as `super().forward(x.float()).type(x.dtype)`.

Torch's norms save their input, as ours do. A module that torch computes from its output must not be added like this.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

from torch import nn

from ..code.code_objects import has_type
from ..rules.norm_trials import TORCH_NORMS
from ..rules.norms import Norm

CLASSES = tuple(TORCH_NORMS)
# By their forwards, as they were when this package was imported: a user may patch them later.
_RULES: dict[Callable[..., Any], tuple[type[nn.Module], Norm]] = {
    kind.forward: (kind, rule) for kind, rule in TORCH_NORMS.items()
}


def class_with_forward(function: Callable[..., Any]) -> type[nn.Module]:
    """The first class of torch's norms whose forward this is."""
    return _RULES[function][0]


def norm_with_forward(function: Any) -> Norm | None:
    """The rule of the norm of torch whose forward this is; None for any other object."""
    is_function = has_type(function, types.FunctionType)
    return _RULES[function][1] if is_function and function in _RULES else None


def exchanging_super(forward: Callable[..., Any]) -> Callable[[Any], Any]:
    """A function that maps the bound `forward` of a norm to the fused norm, and any other callee to itself."""
    kind, rule = _RULES[forward]
    fused = rule.methods(kind)["forward"]

    def exchange(called: Any) -> Any:
        is_known = type(called) is types.MethodType and called.__func__ is forward
        return functools.partial(fused, called.__self__) if is_known else called

    return exchange
