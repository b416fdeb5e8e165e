"""torch's functions that the code calls which ours takes the place of: whether they are what they were.

Somebody may put others in their place, for all modules: one that quantizes in that of `F.linear`, one that counts.
What was there when this package was imported is what ours computes; where anything else is, a model's own code runs.
"""

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .asked import Found, are_same_untraced
from .code.called import is_torchs

_OF_FUNCTIONAL = """batch_norm dropout elu gelu glu group_norm hardswish hardtanh instance_norm layer_norm leaky_relu
    linear mish relu relu6 rms_norm sigmoid silu softplus tanh""".split()
_OF_TORCH = """add addmm batch_norm chunk erf group_norm instance_norm layer_norm mul pow relu rms_norm rsqrt sigmoid
    sqrt square tanh""".split()
_METHODS = """__add__ __iadd__ __getitem__ __mul__ __neg__ __radd__ __rmul__ __sub__ __truediv__ add chunk div float
    mean mul pow relu rsqrt sigmoid size sqrt sub t tanh to type_as view""".split()


def _then(function: Any) -> Any:
    """What a function was. Where somebody was here before this package, all code stays as it is: what is found is never
    the object that this gives."""
    return function if isinstance(function, types.BuiltinFunctionType) or is_torchs(function) else object()


WATCHED: tuple[Found, ...] = tuple(
    (vars(holder), name, _then(vars(holder)[name]))
    for holder, names in ((F, _OF_FUNCTIONAL), (torch, _OF_TORCH))
    for name in names
    if name in vars(holder)
)
_WATCHED_AS_TRACED = tuple((F if held is vars(F) else torch, name, then) for held, name, then in WATCHED)
_OF_TENSOR = vars(Tensor)
# Methods that Tensor inherits: another would be one of its own.
INHERITED = {name: getattr(Tensor, name) for name in _METHODS if name not in vars(Tensor)}
_NAMES = frozenset(INHERITED)


def are_patched() -> bool:
    """Whether any of them is another than when this package was imported. For each call that no compiler traces."""
    return not (are_same_untraced(WATCHED) and (_OF_TENSOR.keys().isdisjoint(_NAMES) or _are_inherited()))


def are_patched_as_traced() -> bool:
    """The same for torch.compile, which guards what it is told of one by one."""
    return any(getattr(holder, name) is not then for holder, name, then in _WATCHED_AS_TRACED)


def _are_inherited() -> bool:
    """Whether what Tensor has of its own under these names is what it would inherit."""
    return all(_OF_TENSOR.get(name, then) is then for name, then in INHERITED.items())
