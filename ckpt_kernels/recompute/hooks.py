"""The saved-tensor hooks of the calling thread, of which torch calls only the innermost pair."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# The module with torch's functions for the stack of hooks, some of which torch's type stubs lack.
STACK: Any = torch._C._autograd
_top_hooks = STACK._top_saved_tensors_default_hooks

# The threads in which `nodes.results_of_function` unpacks tensors only to learn which node made them: unpacking then
# returns a placeholder and computes no value. The list stays the same object.
seekers: list[int] = []


_Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]
# Returns the innermost saved-tensor hooks of this thread, None where there are none.
top_hooks: Callable[[], _Hooks | None] = functools.partial(_top_hooks, True)


def has_innermost_hooks(owner: object) -> bool:
    """Whether the innermost hooks of this thread are a method of this object."""
    top = _top_hooks(True)
    return top is not None and getattr(top[0], "__self__", None) is owner
