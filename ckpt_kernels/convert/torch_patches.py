"""Whether torch's functions, which fused calls stand in for, are patched.

A library may replace such a function for all modules, for example `F.linear` by one that quantizes or counts calls.
Fused calls compute what the functions did when this package was imported; where one is patched, the model's own code
runs.
"""

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import FUNCTION_NAMES
from .code.call_graph import belongs_to_torch
from .native_guards import Binding, are_same_untraced

_OF_FUNCTIONAL = sorted(
    FUNCTION_NAMES.union("batch_norm dropout glu group_norm instance_norm layer_norm linear rms_norm".split())
)
_OF_TORCH = """add addmm batch_norm chunk erf group_norm instance_norm layer_norm mul pow relu rms_norm rsqrt sigmoid
    sqrt square tanh""".split()
# The methods by which blocks are known, and those of the operations that are allowed in trials and formulas. Other
# functions of torch that a trial allows are in the snapshot of the code that was tried.
_METHODS = """__add__ __getitem__ __iadd__ __iter__ __mul__ __neg__ __pow__ __radd__ __rdiv__ __rmul__ __rpow__ __rsub__
    __rtruediv__ __sub__ __truediv__ add bfloat16 chunk clamp clamp_max clamp_min clone contiguous div erf expand
    flatten float mean movedim mul neg permute pow relu repeat_interleave reshape rsqrt sigmoid size split
    split_with_sizes sqrt square sub sum t tanh to transpose type type_as unbind unflatten unsqueeze var view""".split()
_IN_C = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)


def _expected(function: Any) -> Any:
    """The function itself if torch's or Python's. For a function that was patched before this package was imported, an
    object that equals nothing, so that `are_patched` is always true."""
    return function if isinstance(function, _IN_C) or belongs_to_torch(function) else object()


# With modules for holders, whose attributes torch.compile guards one by one.
_TRACED: tuple[Binding, ...] = tuple(
    (holder, name, _expected(vars(holder)[name]))
    for holder, names in ((F, _OF_FUNCTIONAL), (torch, _OF_TORCH))
    for name in names
    if name in vars(holder)
)
_OF_TENSOR = vars(Tensor)
TORCH_FUNCTIONS: tuple[Binding, ...] = (
    *((vars(holder), name, function) for holder, name, function in _TRACED),
    *((Tensor, name, _expected(_OF_TENSOR[name])) for name in _METHODS if name in _OF_TENSOR),
)
# Methods that Tensor inherits. A patch defines one on Tensor itself.
INHERITED_METHODS = tuple(name for name in _METHODS if name not in _OF_TENSOR)
_INHERITED = {name: getattr(Tensor, name) for name in INHERITED_METHODS}


def are_patched() -> bool:
    """Whether any of these functions and methods was replaced since this package was imported.

    Runs at each call that no compiler traces, and must be fast.
    """
    if not are_same_untraced(TORCH_FUNCTIONS):
        return True
    return not (_OF_TENSOR.keys().isdisjoint(INHERITED_METHODS) or _are_inherited())


def are_patched_as_traced() -> bool:
    """Whether any of these functions was replaced, as torch.compile can trace and guard the question."""
    return any(getattr(holder, name) is not value for holder, name, value in _TRACED)


def _are_inherited() -> bool:
    """Whether all attributes that Tensor itself has under these names equal the inherited ones."""
    return all(_OF_TENSOR.get(name, method) is method for name, method in _INHERITED.items())
