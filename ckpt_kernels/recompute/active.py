"""Which contexts are active on this thread, and whose saved-tensor hooks torch calls."""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .discarder import Discarder


class _Thread(threading.local):
    """The contexts of a thread, the innermost last, closed ones among them; and whether it asks torch whose the
    tensors are that a node saves, and not for their values."""

    def __init__(self) -> None:
        self.active: list[Discarder] = []
        self.wants_identities = False


thread = _Thread()


_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def top_hooks() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None:
    return _top_hooks(True)


def sees_what_is_saved(discarder: "Discarder") -> bool:
    """Whether the hooks of this context are the innermost on this thread."""
    top = _top_hooks(True)
    return top is not None and getattr(top[0], "__self__", None) is discarder


def discarding() -> "Discarder | None":
    """The context that sees what is saved now: the innermost, unless somebody else's hooks are within it."""
    found = innermost()
    return found if found is not None and sees_what_is_saved(found) else None


def is_active() -> bool:
    """Whether a context is active on this thread."""
    return innermost() is not None


def innermost() -> "Discarder | None":
    """The innermost context that is open; closed ones are forgotten."""
    active = thread.active
    while active:
        last = active[-1]
        if not last.is_closed:
            return last
        active.pop()
    return None
