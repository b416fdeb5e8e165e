"""Keeps float32 copies of 16-bit tensors in 16 bits where no context discards outputs, as at the level "block"."""

import contextlib
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .active import discarding
from .cells import version_error
from .hooks import top_hooks
from .widened import narrow_copy, widened


class _Packed(NamedTuple):
    """A saved tensor, or its 16-bit copy."""

    content: Any
    unpack: Any
    is_narrow: bool

    def get(self) -> Tensor:
        tensor = self.unpack(self.content)
        return widened(tensor) if self.is_narrow else tensor


def _with_version(tensor: Tensor) -> tuple[Tensor, int]:
    # Detached, because a node that keeps its own output would keep itself alive. The version counter is shared.
    return tensor.detach(), tensor._version


def _if_unwritten(kept: tuple[Tensor, int]) -> Tensor:
    """The tensor, if it has not been written to since: torch checks no versions under hooks."""
    tensor, version = kept
    if tensor._version != version:
        raise version_error(f"{tensor.dtype} {tuple(tensor.shape)}", tensor._version, version)
    return tensor


def keeping_narrow() -> AbstractContextManager[Any]:
    """A context in which blocks keep such copies in 16 bits.

    Within a context that discards outputs, which does the same, it changes nothing.
    """
    hooks: Any = torch._C._autograd  # torch's type stubs lack some of its functions
    # A trace would record the operations of the hooks.
    is_traced = torch._C._get_tracing_state() is not None
    if is_traced or not hooks._saved_tensors_hooks_is_enabled() or discarding() is not None:
        return contextlib.nullcontext()
    pack_outer, unpack_outer = top_hooks() or (_with_version, _if_unwritten)

    def pack(tensor: Tensor) -> _Packed:
        narrow = narrow_copy(tensor)
        return _Packed(pack_outer(tensor if narrow is None else narrow), unpack_outer, narrow is not None)

    return torch.autograd.graph.saved_tensors_hooks(pack, _Packed.get)
