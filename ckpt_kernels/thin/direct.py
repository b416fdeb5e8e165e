"""Loads `_thin`, a module in C that runs the CPU ops as plain functions and checks the tensors of small calls.

A function made by `direct` takes the arguments of the op of the same name in `torch.ops.ckpt_kernels_native`, and runs
the same C++ function without torch's dispatcher. It returns True; or False, with undefined results, if a tensor cannot
be read (a subclass, a tensor outside CPU memory, without memory or without strides) or does not suit the op.

Converted models (`convert.asked`) and the recompute contexts (`recompute.fast_path`) use `_thin` too. If the libraries
are missing, or torch lacks `torch.Tensor.__dlpack_c_exchange_api__`, every call takes the full path.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..libraries import library
from ..recompute import contexts

# Functions that tell whether anything intercepts every op: torch.func, modes of both kinds, the profiler,
# torch.jit.trace.
WATCHERS = (
    torch._C._are_functorch_transforms_active,
    torch._C._len_torch_dispatch_stack,
    torch._C._len_torch_function_stack,
    torch._C._autograd._profiler_enabled,
    torch._C._get_tracing_state,
)


def is_plain(*tensors: Tensor) -> bool:
    """Whether all tensors are None or plain tensors in CPU memory, and only autograd intercepts ops."""
    return False


def key(block: str, tensors: Sequence[Tensor | None], options: tuple) -> tuple | None:
    """A key of everything that the checks of a call depend on; None if the call cannot have a plan."""
    return None


# The module `_thin` itself, for `convert.asked`.
asked: Any = None


def direct(name: str) -> Callable[..., bool]:
    """The op of that name, as a function that returns whether it computed the result."""
    return lambda *arguments: False


def _load() -> str | None:
    """Replaces the functions above, which serve no call, by those of `_thin`. Returns the reason if that fails, else
    None."""
    global is_plain, key, asked, direct
    api = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    path = library("_C")
    if api is None:
        return f"torch {torch.__version__} does not exchange tensors by DLPack's C functions"
    if path is None:
        return "the library _C was not built"
    try:
        from .. import _thin

        find = ctypes.cast(ctypes.CDLL(str(path)).ckpt_kernels_find_call, ctypes.c_void_p).value
        _thin.set_up(api, Tensor, torch.nn.Parameter, torch.Size, Tensor.is_neg, Tensor.storage_offset, WATCHERS)
        # A library built from older sources lacks some of this.
        contexts.use_library(_thin)
    except (ImportError, OSError, AttributeError, RuntimeError, ValueError, TypeError) as error:
        return f"the library _thin does not load: {error}"
    is_plain, key, asked = _thin.is_plain, _thin.key, _thin
    direct = lambda name: _thin.function(find, name)  # noqa: E731
    return None


why_not = _load()
is_available = why_not is None
