"""Which tensors the fused functions take, and which modules can be called by their forward alone."""

import inspect
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from ..ops.registration import is_transformed
from ..thin.direct import WATCHERS, is_plain
from .code.call_graph import is_unpatched
from .native_guards import GlobalStateGuard, ModuleGuard, passes_natively
from .torch_patches import INHERITED_METHODS, TORCH_FUNCTIONS, are_patched, are_patched_as_traced


def _steps_of(kind: type[nn.Module]) -> dict[str, types.FunctionType]:
    """The methods of a class of torch that the forward names, and those that these name.

    Two are left out: they check the input, and the rules of norms call them.
    """
    steps: dict[str, types.FunctionType] = {}
    waiting: list[Any] = [kind.forward]
    while waiting:
        for name in waiting.pop().__code__.co_names:
            step = inspect.getattr_static(kind, name, None)
            of_module = hasattr(nn.Module, name) or name in ("_check_input_dim", "_get_no_batch_dim")
            if isinstance(step, types.FunctionType) and name not in steps and not of_module:
                steps[name] = step
                waiting.append(step)
    return steps


_TENSORS = (Tensor, nn.Parameter)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_METHOD: Any = Tensor.__torch_function__
_FUNCTION = _METHOD.__func__
_CALLS = {name: getattr(nn.Module, name) for name in ("__call__", "_call_impl")}
# None, which equals no method, where torch's methods are patched.
_CALL, _CALL_IMPL = (call if is_unpatched(call) else None for call in _CALLS.values())
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
CALLS_FORWARD = (("__call__", _CALL), ("_call_impl", _CALL_IMPL))
_PLAIN_CALL = ModuleGuard(nn.Module, CALLS_FORWARD, (), (), HOOKS, ("forward",))
# The forwards of torch's modules that are not patched, and their code.
FORWARDS = {
    kind: (kind.forward, kind.forward.__code__)
    for kind in vars(nn).values()
    if isinstance(kind, type) and issubclass(kind, nn.Module) and is_unpatched(kind.forward)
}
# The methods that their forwards call, and the code of these.
_STEPS = {
    kind: [(name, step, step.__code__) for name, step in _steps_of(kind).items()]
    for kind, (forward, code) in FORWARDS.items()
}
_global_hooks = nn.modules.module
_is_compiling = torch.compiler.is_compiling
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack


# The conditions of `is_observed`, `has_global_hooks` and `is_autocast`.
GLOBAL_STATE = GlobalStateGuard(
    (*WATCHERS, torch._C._is_any_autocast_enabled),
    (*TORCH_FUNCTIONS, (vars(forward_ad), "_current_level", -1)),
    ((vars(Tensor), INHERITED_METHODS),),
    ((vars(_global_hooks), tuple(f"_global_{name[1:]}" for name in HOOKS)),),
)


def is_operand(value: Any) -> bool:
    """Whether the fused functions take the value as an operand, in the present modes and transforms."""
    if _is_compiling():
        return is_ordinary(value) and not are_patched_as_traced()
    # The usual case first, most of which is one check in C: a plain tensor, and neither modes nor transforms.
    if value is not None and is_plain(value) and forward_ad._current_level < 0:
        return value.dtype in _DTYPES and not are_patched()
    return is_ordinary(value) and not is_observed()


def matches_input(value: Any, input: Tensor) -> bool:
    """Whether the value is an ordinary tensor with the dtype and the device of `input`, an ordinary tensor too."""
    return (
        type(value) in _TENSORS
        and value.dtype is input.dtype
        and value.device == input.device
        and value.layout is torch.strided
        and not value.is_nested
    )


def is_ordinary(value: Any) -> bool:
    """Whether the value is a tensor that the fused functions take: dense, with a supported dtype, on a CPU or GPU."""
    return (
        type(value) in _TENSORS
        and value.dtype in _DTYPES
        and (value.is_cpu or value.is_cuda)
        and value.layout is torch.strided
        and not value.is_nested
    )


def is_observed() -> bool:
    """Whether something must see each operation of the model's own code: a transform of torch's, a mode that may change
    operations, or patches of torch's functions.

    torch.compile does not count, because the compiler can trace the fused ops.
    """
    if _is_compiling():
        return are_patched_as_traced()
    if is_plain() and forward_ad._current_level < 0:  # the check in C finds neither modes nor transforms
        return are_patched()
    return are_patched() or is_transformed() or _dispatch_modes() > 0 or (_function_modes() > 0 and _is_in_mode())


def _is_in_mode() -> bool:
    """Whether a function mode is active other than a default device's, which changes nothing but the device of new
    tensors."""
    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())


def as_plain_tensor(value: Any) -> tuple[Any, type[Tensor] | None]:
    """The value and None; for a tensor of a subclass that overrides nothing, a plain tensor and the subclass.

    A checkpoint calls the function with plain tensors when the backward pass runs the function again, and both runs
    must compute the same.
    """
    kind = type(value)
    if kind in _TENSORS or not isinstance(value, Tensor):
        return value, None
    is_trivial = getattr(kind.__torch_function__, "__func__", None) is _FUNCTION
    is_trivial = is_trivial and kind.__torch_dispatch__ is Tensor.__torch_dispatch__ and not _overrides(kind)
    return (value.as_subclass(Tensor), kind) if is_trivial and not isinstance(value, nn.Parameter) else (value, None)


# Attributes that Tensor has too and that a subclass may define without a change of any operation.
_OF_CLASSES = frozenset(
    """__annotations__ __deepcopy__ __dict__ __doc__ __firstlineno__ __format__ __init__ __init_subclass__ __module__
    __new__ __orig_bases__ __parameters__ __reduce__ __reduce_ex__ __repr__ __setstate__ __slots__
    __static_attributes__ __str__ __torch_function__ __weakref__""".split()
)
_OF_TENSORS = frozenset(dir(Tensor)) - _OF_CLASSES


def _overrides(kind: type[Tensor]) -> bool:
    """Whether the subclass redefines methods or operators of Tensor."""
    subclasses = kind.__mro__[: kind.__mro__.index(Tensor)]
    return any(not _OF_TENSORS.isdisjoint(vars(subclass)) for subclass in subclasses)


def is_called_plainly(module: nn.Module) -> bool:
    """Whether a call of the module runs the class's forward and nothing else: no hooks, no forward on the instance."""
    return passes_natively(module, _PLAIN_CALL) or (class_calls_forward(type(module)) and is_plain_instance(module))


def class_calls_forward(kind: type[nn.Module]) -> bool:
    """Whether torch's own `__call__` calls the forward of instances of the class.

    `memory.saved` wraps `__call__` to know which module runs, and marks the wrapper as harmless.
    """
    call = kind.__call__
    return kind._call_impl is _CALL_IMPL and (call is _CALL or hasattr(call, "only_names_modules"))


def has_forward_of(kind: type[nn.Module], torchs: type[nn.Module]) -> bool:
    """Whether a class has the forward of a class of torch, and the methods that the forward calls, unchanged since this
    package was imported."""
    forward, code = FORWARDS.get(torchs, (None, None))
    return forward is not None and kind.forward is forward and forward.__code__ is code and has_steps_of(kind, torchs)


def has_steps_of(kind: type[nn.Module], torchs: type[nn.Module]) -> bool:
    """Whether a class has the methods that the forward of a class of torch calls, unchanged since this package was
    imported."""
    steps = _STEPS.get(torchs, ())
    return all(getattr(kind, name, None) is step and step.__code__ is code for name, step, code in steps)


def runs_steps_of(module: nn.Module, torchs: type[nn.Module]) -> bool:
    """The same for an instance, which may have replaced a method."""
    return has_steps_of(type(module), torchs) and not any(name in vars(module) for name, *_ in _STEPS.get(torchs, ()))


def is_plain_instance(module: nn.Module) -> bool:
    """Whether the module has no hooks and no forward on the instance."""
    attributes = module.__dict__
    return not (
        attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
        or "forward" in attributes
    )


def has_global_hooks() -> bool:
    """Whether hooks are registered for the calls of all modules."""
    return bool(
        _global_hooks._global_forward_hooks
        or _global_hooks._global_forward_pre_hooks
        or _global_hooks._global_backward_hooks
        or _global_hooks._global_backward_pre_hooks
    )
