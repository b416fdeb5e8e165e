"""The providers: ours on each backend, eager torch, torch.compile, torch.utils.checkpoint, and importable peers."""

import contextlib
import functools
import types
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ckpt_kernels import backends, use_backend

from .cases import Case
from .peers import peers


@dataclass
class Provider:
    """`fn` computes the block's outputs from operands by name; `context` is entered around the passes."""

    name: str
    fn: Callable[..., Sequence[Tensor]]
    context: Callable[[], AbstractContextManager] = contextlib.nullcontext


def providers(
    case: Case, device: str, dtype: torch.dtype, compiled: bool = True, max_autotune: bool = False
) -> list[Provider]:
    """All providers that can serve this case here. Ours on the automatically chosen backend comes first."""
    ours, eager = case.block.call, case.block.eager
    chosen = backends.selected_name(device, dtype)
    names = [chosen, *(name for name in backends.NAMES if name != chosen)]
    found = [
        Provider(f"ours ({name})", ours, lambda name=name: use_backend(name))
        for name in names
        if backends.why_not(name, device, dtype) is None and name != "reference"
    ]
    found.append(Provider("eager", eager))
    if compiled:
        found.append(Provider("torch.compile", torch.compile(eager, dynamic=False)))
    if max_autotune:
        tuned = torch.compile(_own_code(eager), dynamic=False, mode="max-autotune-no-cudagraphs")
        found.append(Provider("torch.compile, max-autotune", tuned))
    found.append(Provider("checkpoint", functools.partial(checkpoint, eager, use_reentrant=False)))
    # Peers take the operands by position.
    return found + [
        Provider(name, lambda call=call, **operands: call(*operands.values())) for name, call in peers(case.name)
    ]


def _own_code(fn: Callable[..., Sequence[Tensor]]) -> Callable[..., Sequence[Tensor]]:
    """The same function with a code object of its own, because torch.compile caches by code object."""
    return types.FunctionType(fn.__code__.replace(), fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
