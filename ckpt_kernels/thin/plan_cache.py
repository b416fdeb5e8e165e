"""The plans of calls that were made before: one check decides whether a call like one of them may go by its plan."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import backends
from .direct import is_available, key

# Shapes and options of a program are few; where they are not, what is remembered does not grow without end.
MOST_PLANS = 4096

_is_compiling = torch.compiler.is_compiling
_NATIVE = ("auto", "native")
_plans: dict[tuple | None, Any] = {}


def plan_of(block: str, tensors: Sequence[Tensor | None], options: tuple) -> Any:
    """What was remembered of a call like this one, a `Plan` or the block of a linear layer; None where there was none
    like it, or where the full path must serve it."""
    # First: a compiler folds this, and sees nothing of the rest.
    if _is_compiling() or forward_ad._current_level >= 0:
        return None
    if backends.chosen() not in _NATIVE:
        return None
    return _plans.get(key(block, tensors, options))


def remember(plan: Any, block: str, tensors: Sequence[Tensor | None], options: tuple) -> None:
    """After the checks of a call: the next one like it goes by `plan`, if there is one."""
    if plan is None or not is_available or torch.compiler.is_compiling() or len(_plans) >= MOST_PLANS:
        return
    known = key(block, tensors, options)
    if known is not None:
        _plans[known] = plan
