"""The plans of earlier calls, found by a key of everything that the checks of a call depend on."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import backends
from .direct import is_available, key

# A program usually has few shapes and options. If there are more, the cache stops growing here.
MOST_PLANS = 4096

_is_compiling = torch.compiler.is_compiling
_NATIVE = ("auto", "native")
_plans: dict[tuple | None, Any] = {}


def plan_of(block: str, tensors: Sequence[Tensor | None], options: tuple) -> Any:
    """The plan of a call like this one, a `Plan` or the block of a linear layer; None if there is none, or if the full
    path must serve the call."""
    # First, because a compiler folds this check, and traces none of the code below.
    if _is_compiling() or forward_ad._current_level >= 0:
        return None
    if backends.chosen() not in _NATIVE:
        return None
    return _plans.get(key(block, tensors, options))


def remember(plan: Any, block: str, tensors: Sequence[Tensor | None], options: tuple) -> None:
    """Stores the plan, if there is one, for later calls like this one, after the checks of this call."""
    if plan is None or not is_available or torch.compiler.is_compiling() or len(_plans) >= MOST_PLANS:
        return
    call_key = key(block, tensors, options)
    if call_key is not None:
        _plans[call_key] = plan
