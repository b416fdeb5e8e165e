"""The contexts that are active on a thread, and the saved-tensor hooks that torch calls."""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .discarder import Discarder


class _Thread(threading.local):
    """The contexts of a thread, the innermost last. Closed contexts may still be in the list."""

    def __init__(self) -> None:
        self.active: list[Discarder] = []


thread = _Thread()

# The threads in which `nodes.results_of_function` unpacks tensors only to learn which node made them: unpacking then
# returns a placeholder and computes no value. The list stays the same object.
seekers: list[int] = []


_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def top_hooks() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None:
    """The innermost saved-tensor hooks of this thread, None where there are none."""
    return _top_hooks(True)


def has_innermost_hooks(discarder: "Discarder") -> bool:
    """Whether the hooks of this context are the innermost on this thread."""
    top = _top_hooks(True)
    return top is not None and getattr(top[0], "__self__", None) is discarder


def discarding() -> "Discarder | None":
    """The context whose hooks see the tensors saved now: the innermost, unless foreign hooks are inside."""
    discarder = innermost()
    return discarder if discarder is not None and has_innermost_hooks(discarder) else None


def is_active() -> bool:
    """Whether a context is active on this thread."""
    return innermost() is not None


def innermost() -> "Discarder | None":
    """The innermost open context. Closed contexts are removed from the list."""
    active = thread.active
    while active:
        last = active[-1]
        if not last.is_closed:
            return last
        active.pop()
    return None
