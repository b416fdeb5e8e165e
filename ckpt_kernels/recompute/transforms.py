"""Lets torch.func's gradients begin within a context, which torch forbids where saved-tensor hooks are active.

torch.func disables hooks by `torch.autograd.graph.disable_saved_tensors_hooks`, which raises an error if hooks are
active. Once the first context has been opened, that function first removes the hooks of this package from the calling
thread, and restores them afterwards. Foreign hooks stay, and still cause the error. Within the transform torch keeps
the same tensors as without a context. So nobody has to search a model's code for transforms. torch.compile recognizes
the function by identity, so the function object stays the same: the generator in the function's closure is replaced.
"""

import contextlib
import functools
from collections.abc import Callable, Generator
from typing import Any

import torch

from ..saved_tensor_hooks import may_step_aside
from .active import thread
from .discarder import Discarder
from .hooks import STACK, has_innermost_hooks, top_hooks

_Disabling = Callable[[str], Generator[None, None, None]]


@functools.cache
def allow_transforms() -> None:
    """Lets torch.func's gradients begin within contexts. If torch's function has an unexpected form, nothing changes
    and torch's own error remains."""
    function: Any = torch.autograd.graph.disable_saved_tensors_hooks
    generator: _Disabling | None = getattr(function, "__wrapped__", None)
    for cell in getattr(function, "__closure__", None) or ():
        if generator is not None and cell.cell_contents is generator:
            cell.cell_contents = _without_own_hooks(generator)


def _without_own_hooks(disabling: _Disabling) -> _Disabling:
    context = contextlib.contextmanager(disabling)

    @functools.wraps(disabling)
    def generator(error_message: str) -> Generator[None, None, None]:
        removed: list[tuple[Discarder | None, Any]] = []
        while (pair := top_hooks()) is not None:
            discarder = next(filter(has_innermost_hooks, reversed(thread.active)), None)
            if discarder is None and not may_step_aside(pair[0]):
                break
            removed.append((discarder, pair))
            STACK._pop_saved_tensors_default_hooks()
        try:
            with context(error_message):
                yield
        finally:
            for discarder, pair in reversed(removed):
                if discarder is None or not discarder.is_closed:
                    STACK._push_saved_tensors_default_hooks(*pair)

    return generator
