"""What a thread is at: whether layers of a run run, or run again, and which run the next layer may go on with."""

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .run import Run


class State(threading.local):
    def __init__(self) -> None:
        # The run that the next layer may go on with; and whether a layer of one runs, or runs again.
        self.open: weakref.ref[Run] | None = None
        self.within = False
        self.repeating = False


thread = State()


@contextlib.contextmanager
def repeating() -> Iterator[None]:
    before, thread.repeating = thread.repeating, True
    open_run, thread.open = thread.open, None
    try:
        yield
    finally:
        thread.repeating, thread.open = before, open_run


def is_repeating() -> bool:
    """Whether this thread runs layers again for a backward pass."""
    return thread.repeating
