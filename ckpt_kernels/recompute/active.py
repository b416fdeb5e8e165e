"""The contexts that are active on a thread."""

import threading

from .discarder import Discarder
from .hooks import has_innermost_hooks


class _Thread(threading.local):
    """The contexts of a thread, the innermost last. Closed contexts may still be in the list."""

    def __init__(self) -> None:
        self.active: list[Discarder] = []


thread = _Thread()


def discarding() -> Discarder | None:
    """The context whose hooks see the tensors saved now: the innermost, unless foreign hooks are inside."""
    discarder = innermost()
    return discarder if discarder is not None and has_innermost_hooks(discarder) else None


def is_active() -> bool:
    """Whether a context is active on this thread."""
    return innermost() is not None


def innermost() -> Discarder | None:
    """The innermost open context. Closed contexts are removed from the list."""
    active = thread.active
    while active:
        last = active[-1]
        if not last.is_closed:
            return last
        active.pop()
    return None
