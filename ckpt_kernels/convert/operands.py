"""What may be computed by us: tensors of the kinds that our functions take, and modules whose call is their forward."""

from typing import Any

import torch
from torch import Tensor, nn

_TENSORS = (Tensor, nn.Parameter)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_FUNCTION = Tensor.__torch_function__.__func__
_CALL, _CALL_IMPL = nn.Module.__call__, nn.Module._call_impl
_everybody = nn.modules.module
_forward_ad = torch.autograd.forward_ad


def is_operand(value: Any) -> bool:
    """Whether our functions take it, here and now."""
    return is_ordinary(value) and not is_transformed()


def is_ordinary(value: Any) -> bool:
    """Whether it is a tensor of the kind that our functions take."""
    return (
        type(value) in _TENSORS
        and value.dtype in _DTYPES
        and (value.is_cpu or value.is_cuda)
        and value.layout is torch.strided
        and not value.is_nested
    )


def is_transformed() -> bool:
    """Whether torch.func, forward-mode differentiation or jit.trace see each operation: that is torch's own affair."""
    if torch.compiler.is_compiling():
        return False
    tracing = torch._C._get_tracing_state() is not None
    return tracing or torch._C._are_functorch_transforms_active() or _forward_ad._current_level >= 0


def as_plain(value: Any) -> tuple[Any, type[Tensor] | None]:
    """A tensor of a subclass that changes nothing of what torch's functions do, as a plain one, and its class.

    A checkpoint gives its function plain tensors when it runs again: both times the same must be computed.
    """
    kind = type(value)
    if kind in _TENSORS or not isinstance(value, Tensor):
        return value, None
    same = getattr(kind.__torch_function__, "__func__", None) is _FUNCTION
    same = same and kind.__torch_dispatch__ is Tensor.__torch_dispatch__
    return (value.as_subclass(Tensor), kind) if same and not isinstance(value, nn.Parameter) else (value, None)


def is_called_plainly(module: nn.Module) -> bool:
    """Whether a call of the module is its class's forward and nothing else: no hooks, no forward of its own."""
    held, kind = module.__dict__, type(module)
    return (
        not (
            held["_forward_hooks"]
            or held["_forward_pre_hooks"]
            or held["_backward_hooks"]
            or held["_backward_pre_hooks"]
            or "forward" in held
        )
        and kind.__call__ is _CALL
        and kind._call_impl is _CALL_IMPL
    )


def has_hooks_for_all() -> bool:
    """Whether somebody's hooks are to see the calls of all modules."""
    return bool(
        _everybody._global_forward_hooks
        or _everybody._global_forward_pre_hooks
        or _everybody._global_backward_hooks
        or _everybody._global_backward_pre_hooks
    )
