"""torch.func's gradients within a context, which may not begin where there are saved-tensor hooks.

They disable hooks by `torch.autograd.graph.disable_saved_tensors_hooks`, which raises an error where there are any.
From the first context on, that function takes the hooks of this package off the calling thread before it does so, and
puts them back when it is done; hooks of others stay, and are an error as ever. What runs in between keeps what torch
keeps. So a model's code need not be searched for transforms. torch.compile knows the function by its identity, so
that it stays the object it is: the generator in its closure is exchanged.
"""

import contextlib
import functools
from collections.abc import Callable, Generator
from typing import Any

import torch

from .active import sees_what_is_saved, thread, top_hooks

_Disabling = Callable[[str], Generator[None, None, None]]


@functools.cache
def allow_transforms() -> None:
    """Lets torch.func's gradients begin within contexts; does nothing where torch's function is another than
    known: torch's own error comes then."""
    function: Any = torch.autograd.graph.disable_saved_tensors_hooks
    generator: _Disabling | None = getattr(function, "__wrapped__", None)
    for cell in getattr(function, "__closure__", None) or ():
        if generator is not None and cell.cell_contents is generator:
            cell.cell_contents = _without_own(generator)


def _without_own(disabling: _Disabling) -> _Disabling:
    context = contextlib.contextmanager(disabling)

    @functools.wraps(disabling)
    def generator(error_message: str) -> Generator[None, None, None]:
        hooks: Any = torch._C._autograd  # of which not all is in torch's stubs
        taken = []
        while discarders := [discarder for discarder in thread.active if sees_what_is_saved(discarder)]:
            taken.append((discarders[-1], top_hooks()))
            hooks._pop_saved_tensors_default_hooks()
        try:
            with context(error_message):
                yield
        finally:
            for discarder, pair in reversed(taken):
                if not discarder.is_closed:
                    hooks._push_saved_tensors_default_hooks(*pair)

    return generator
