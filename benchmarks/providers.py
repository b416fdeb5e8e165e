"""Who computes: ours on each backend, eager torch, torch.compile, torch.utils.checkpoint, and peers that import."""

import contextlib
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
    """`fn` computes the case's outputs; `context` is entered around its forward and backward pass."""

    name: str
    fn: Callable[..., Sequence[Tensor]]
    context: Callable[[], AbstractContextManager] = contextlib.nullcontext


def _checkpointed(case: Case) -> Callable[..., Sequence[Tensor]]:
    return lambda *operands: checkpoint(case.eager, *operands, use_reentrant=False)


def providers(
    case: Case, device: str, dtype: torch.dtype, compiled: bool = True, max_autotune: bool = False
) -> list[Provider]:
    """All that can serve this case here. Ours on the backend that is chosen by itself comes first."""
    chosen = backends.selected_name(device, dtype)
    names = [chosen, *(name for name in backends.NAMES if name != chosen)]
    found = [
        Provider(f"ours ({name})", case.ours, lambda name=name: use_backend(name))
        for name in names
        if backends.why_not(name, device, dtype) is None and name != "reference"
    ]
    found.append(Provider("eager", case.eager))
    if compiled:
        found.append(Provider("torch.compile", torch.compile(case.eager, dynamic=False)))
    if max_autotune:
        tuned = torch.compile(_own_code(case.eager), dynamic=False, mode="max-autotune-no-cudagraphs")
        found.append(Provider("torch.compile, max-autotune", tuned))
    found.append(Provider("checkpoint", _checkpointed(case)))
    return found + [Provider(name, call) for name, call in peers(case.name)]


def _own_code(fn: Callable[..., Sequence[Tensor]]) -> Callable[..., Sequence[Tensor]]:
    """The same function with a code object of its own, by which torch.compile tells what it has compiled."""
    return types.FunctionType(fn.__code__.replace(), fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
