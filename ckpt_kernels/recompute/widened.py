"""Float32 copies of 16-bit tensors, as in `F.gelu(x.float())`. They are kept in 16 bits: casting them back loses
nothing."""

import contextlib
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .active import discarding, top_hooks
from .cells import version_error
from .nodes import name_of
from .small_operands import fills_memory

_NARROW = (torch.bfloat16, torch.float16)


def narrow_copy(tensor: Tensor) -> Tensor | None:
    """The 16-bit copy of a whole tensor that was cast to float32 from 16 bits, and not written to since.

    None for any other tensor.
    """
    return tensor.detach().to(_dtype_before(tensor)) if _is_copy(tensor) and fills_memory(tensor) else None


def _is_copy(tensor: Tensor) -> bool:
    if tensor.dtype is not torch.float32 or type(tensor) is not Tensor or tensor._version:
        return False
    # A tangent would be lost.
    return torch.autograd.forward_ad._current_level < 0 and _dtype_before(tensor) in _NARROW


def _dtype_before(tensor: Tensor) -> torch.dtype | None:
    """The dtype that a tensor was cast from, if a cast made the tensor."""
    node: Any = tensor.grad_fn
    if node is None or name_of(node) != "ToCopyBackward0":
        return None
    maker, output = node.next_functions[0]
    return None if maker is None else maker._input_metadata[output].dtype


def widened(copy: Tensor) -> Tensor:
    """The values of a 16-bit copy in float32."""
    return copy.to(torch.float32)


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


def is_widened(input: Tensor) -> bool:
    """Whether a tensor is a float32 copy of a 16-bit tensor, which a block keeps for the gradient in 16 bits."""
    # A compiler cannot trace nodes. Without gradients torch reads no node either: to read that of one of several views
    # whose base was written to is an error.
    if input.dtype is not torch.float32 or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return input.grad_fn is not None and _is_copy(input)


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
