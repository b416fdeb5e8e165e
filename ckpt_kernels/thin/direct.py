"""What `_thin`, a module in C, gives: the CPU ops as plain functions, and the check of a small call. Others take from
it what converted models ask (`convert.native_guards`) and what outputs are let go of by (`recompute.quick`).

A function made by `direct` takes what the op of the same name in `torch.ops.ckpt_kernels_native` takes, and runs the
same C++ function, without torch's dispatcher. It returns True; or False, its results undefined, where a tensor is none
that it can read (a subclass, one that lies elsewhere than in the CPU's memory, one without memory or strides), or none
that the op takes.

Where the libraries are missing, or torch's part of this (`torch.Tensor.__dlpack_c_exchange_api__`), no call is small.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..libraries import library
from ..recompute import contexts

# What may see every op: torch.func, modes of both kinds, the profiler, torch.jit.trace.
WATCHERS = (
    torch._C._are_functorch_transforms_active,
    torch._C._len_torch_dispatch_stack,
    torch._C._len_torch_function_stack,
    torch._C._autograd._profiler_enabled,
    torch._C._get_tracing_state,
)


def is_plain(*tensors: Tensor) -> bool:
    """Whether these are plain tensors in the CPU's memory or None, and nothing but autograd is to see what is done."""
    return False


def key(block: str, tensors: Sequence[Tensor | None], options: tuple) -> tuple | None:
    """What the checks of a call depend on; None where they depend on more, or something else is to see the call."""
    return None


# What else `_thin` answers: see `convert.native_guards`.
asked: Any = None


def direct(name: str) -> Callable[..., bool]:
    """The op of that name."""
    return lambda *arguments: False


def _load() -> str | None:
    """Puts the functions of `_thin` in the place of those above, which serve nothing; returns why that is not possible,
    or None."""
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
        # One that was built of older sources lacks some of this.
        contexts.use_library(_thin)
    except (ImportError, OSError, AttributeError, RuntimeError, ValueError, TypeError) as error:
        return f"the library _thin does not load: {error}"
    is_plain, key, asked = _thin.is_plain, _thin.key, _thin
    direct = lambda name: _thin.function(find, name)  # noqa: E731
    return None


why_not = _load()
is_available = why_not is None
