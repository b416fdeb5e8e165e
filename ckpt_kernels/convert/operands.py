"""What may be computed by us: tensors of the kinds that our functions take, and modules whose call is their forward."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from ..ops.registration import is_transformed
from ..thin.direct import WATCHERS, is_plain
from .asked import Quiet, Such, is_surely
from .code.call_graph import is_unpatched
from .patched import INHERITED, WATCHED, are_patched, are_patched_as_traced

_TENSORS = (Tensor, nn.Parameter)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_METHOD: Any = Tensor.__torch_function__
_FUNCTION = _METHOD.__func__
_CALLS = {name: getattr(nn.Module, name) for name in ("__call__", "_call_impl")}
# None, which no method is, where somebody has put others in their place.
_CALL, _CALL_IMPL = (call if is_unpatched(call) else None for call in _CALLS.values())
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
CALLS_FORWARD = (("__call__", _CALL), ("_call_impl", _CALL_IMPL))
_CALLED_PLAINLY = Such(nn.Module, CALLS_FORWARD, (), (), HOOKS, ("forward",))
_everybody = nn.modules.module
_is_compiling = torch.compiler.is_compiling
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack


# What `is_watched`, `has_hooks_for_all` and `is_autocast` ask.
QUIET = Quiet(
    (*WATCHERS, torch._C._is_any_autocast_enabled),
    (*WATCHED, (vars(forward_ad), "_current_level", -1)),
    ((vars(Tensor), tuple(INHERITED)),),
    ((vars(_everybody), tuple(f"_global_{name[1:]}" for name in HOOKS)),),
)


def is_operand(value: Any) -> bool:
    """Whether our functions take it, here and now."""
    if _is_compiling():
        return is_ordinary(value) and not are_patched_as_traced()
    # The usual case, of which C answers most at once: a plain tensor, and neither modes nor transforms.
    if value is not None and is_plain(value) and forward_ad._current_level < 0:
        return value.dtype in _DTYPES and not are_patched()
    return is_ordinary(value) and not is_watched()


def is_beside(value: Any, input: Tensor) -> bool:
    """Whether it is an ordinary tensor of the dtype, and on the device, of one that is ordinary."""
    return (
        type(value) in _TENSORS
        and value.dtype is input.dtype
        and value.device == input.device
        and value.layout is torch.strided
        and not value.is_nested
    )


def is_ordinary(value: Any) -> bool:
    """Whether it is a tensor of the kind that our functions take."""
    return (
        type(value) in _TENSORS
        and value.dtype in _DTYPES
        and (value.is_cpu or value.is_cuda)
        and value.layout is torch.strided
        and not value.is_nested
    )


def is_watched() -> bool:
    """Whether each operation is seen as it is written: by a transform of torch's, by a mode that may change it, or by
    functions that are in the place of torch's.

    (torch.compile sees ours.)
    """
    if _is_compiling():
        return are_patched_as_traced()
    if is_plain() and forward_ad._current_level < 0:  # for C: there are no modes and no transforms
        return are_patched()
    return are_patched() or is_transformed() or _dispatch_modes() > 0 or (_function_modes() > 0 and _is_in_a_mode())


def _is_in_a_mode() -> bool:
    """Beside that of a default device, which changes nothing but where new tensors are."""
    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())


def as_plain(value: Any) -> tuple[Any, type[Tensor] | None]:
    """A tensor of a subclass that changes nothing of what torch's functions do, as a plain one, and its class.

    A checkpoint gives its function plain tensors when it runs again: both times the same must be computed.
    """
    kind = type(value)
    if kind in _TENSORS or not isinstance(value, Tensor):
        return value, None
    same = getattr(kind.__torch_function__, "__func__", None) is _FUNCTION
    same = same and kind.__torch_dispatch__ is Tensor.__torch_dispatch__ and not _overrides(kind)
    return (value.as_subclass(Tensor), kind) if same and not isinstance(value, nn.Parameter) else (value, None)


# What a subclass may have of its own that Tensor has too, and compute what Tensor does.
_OF_CLASSES = frozenset(
    """__annotations__ __deepcopy__ __dict__ __doc__ __firstlineno__ __format__ __init__ __init_subclass__ __module__
    __new__ __orig_bases__ __parameters__ __reduce__ __reduce_ex__ __repr__ __setstate__ __slots__
    __static_attributes__ __str__ __torch_function__ __weakref__""".split()
)
_OF_TENSORS = frozenset(dir(Tensor)) - _OF_CLASSES


def _overrides(kind: type[Tensor]) -> bool:
    """Whether the subclass has methods or operators in the place of Tensor's."""
    own = kind.__mro__[: kind.__mro__.index(Tensor)]
    return any(not _OF_TENSORS.isdisjoint(vars(each)) for each in own)


def is_called_plainly(module: nn.Module) -> bool:
    """Whether a call of the module is its class's forward and nothing else: no hooks, no forward of its own."""
    return is_surely(module, _CALLED_PLAINLY) or (calls_forward(type(module)) and is_bare(module))


def calls_forward(kind: type[nn.Module]) -> bool:
    """Whether a call of a module of the class is torch's way to call its forward."""
    call = kind.__call__
    return kind._call_impl is _CALL_IMPL and (call is _CALL or hasattr(call, "only_names_modules"))


def is_bare(module: nn.Module) -> bool:
    """Whether the module itself has no hooks, and no forward of its own."""
    held = module.__dict__
    return not (
        held["_forward_hooks"]
        or held["_forward_pre_hooks"]
        or held["_backward_hooks"]
        or held["_backward_pre_hooks"]
        or "forward" in held
    )


def has_hooks_for_all() -> bool:
    """Whether somebody's hooks are to see the calls of all modules."""
    return bool(
        _everybody._global_forward_hooks
        or _everybody._global_forward_pre_hooks
        or _everybody._global_backward_hooks
        or _everybody._global_backward_pre_hooks
    )
