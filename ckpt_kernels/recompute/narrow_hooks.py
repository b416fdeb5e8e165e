"""Keeps float32 copies of 16-bit tensors in 16 bits where no context discards outputs, as at the level "block"."""

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from .active import discarding
from .cells import Kept, Operand, OuterPacked
from .hooks import STACK, top_hooks
from .widened import narrow_copy, widened


def keeping_narrow() -> AbstractContextManager[Any]:
    """A context in which blocks keep such copies in 16 bits.

    Within a context that discards outputs, which does the same, it changes nothing.
    """
    # A trace would record the operations of the hooks.
    is_traced = torch._C._get_tracing_state() is not None
    if is_traced or not STACK._saved_tensors_hooks_is_enabled() or discarding() is not None:
        return contextlib.nullcontext()
    outer = top_hooks()

    def pack(tensor: Tensor) -> tuple[Operand, bool]:
        narrow = narrow_copy(tensor)
        kept = tensor if narrow is None else narrow
        if outer is not None:
            pack_outer, unpack_outer = outer
            return OuterPacked(pack_outer(kept), unpack_outer), narrow is not None
        # Detached, because a node that keeps its own output would keep itself alive. The version counter is shared.
        return Kept(kept.detach(), False), narrow is not None

    return torch.autograd.graph.saved_tensors_hooks(pack, _unpack)


def _unpack(packed: tuple[Operand, bool]) -> Tensor:
    content, is_narrow = packed
    return widened(content.get()) if is_narrow else content.get()
