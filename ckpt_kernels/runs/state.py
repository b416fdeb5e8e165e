"""The state of a thread: whether layers of a run are running or running again, and the run that the next layer may
continue."""

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..random_state import RandomState

if TYPE_CHECKING:
    from .run import Run


class State(threading.local):
    """The run that the next layer may continue, and whether a layer of a run is running (`within`) or running again."""

    def __init__(self) -> None:
        self.open: weakref.ref[Run] | None = None
        self.within = False
        self.repeating = False
        # The state of the generators at the start of the last call, for the next call if nothing is drawn in between.
        self.random: RandomState | None = None


thread = State()


@contextlib.contextmanager
def repeating() -> Iterator[None]:
    """A context in which layers run again, and no run is open."""
    before, thread.repeating = thread.repeating, True
    open_run, thread.open = thread.open, None
    try:
        yield
    finally:
        thread.repeating, thread.open = before, open_run


def is_repeating() -> bool:
    """Whether this thread runs layers again for a backward pass."""
    return thread.repeating
