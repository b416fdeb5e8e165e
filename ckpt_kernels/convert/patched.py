"""torch's functions that the code calls which ours takes the place of: whether they are what they were.

Somebody may put others in their place, for all modules: one that quantizes in that of `F.linear`, one that counts.
What was there when this package was imported is what ours computes; where anything else is, a model's own code runs.
"""

import operator
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .called import is_torchs

_OF_FUNCTIONAL = """batch_norm dropout elu gelu glu group_norm hardswish instance_norm layer_norm leaky_relu linear mish
    relu rms_norm sigmoid silu softplus tanh""".split()
_OF_TORCH = """add addmm batch_norm chunk erf group_norm instance_norm layer_norm mul pow relu rms_norm rsqrt sigmoid
    sqrt square tanh""".split()
_METHODS = """__add__ __iadd__ __getitem__ __mul__ __neg__ __radd__ __rmul__ __sub__ __truediv__ add chunk div float
    mean mul pow relu rsqrt sigmoid size sqrt sub t tanh to type_as view""".split()


class _Held(NamedTuple):
    """Names of a module or class, what reads them all at once, and what they were."""

    holder: Any
    names: tuple[str, ...]
    read: Callable[[Any], tuple[Any, ...]]
    then: tuple[Any, ...]


def _held(holder: Any, names: list[str]) -> _Held:
    own = tuple(name for name in names if name in vars(holder))
    read = operator.itemgetter(*own)
    return _Held(holder, own, read, read(vars(holder)))


_WATCHED = tuple(_held(*of) for of in ((F, _OF_FUNCTIONAL), (torch, _OF_TORCH)))
_READ_F, _READ_T = (held.read for held in _WATCHED)
_OF_F, _OF_T, _OF_TENSOR = (vars(holder) for holder in (F, torch, Tensor))
# Methods that Tensor inherits: another would be one of its own.
_INHERITED = {name: getattr(Tensor, name) for name in _METHODS if name not in vars(Tensor)}
_NAMES = frozenset(_INHERITED)


# Where somebody was here before this package, all code stays as it is: what is found is never one of these.
_THEN = tuple(
    f if isinstance(f, types.BuiltinFunctionType) or is_torchs(f) else object() for held in _WATCHED for f in held.then
)
_is = operator.is_


def are_patched() -> bool:
    """Whether any of them is another than when this package was imported. For each call."""
    try:
        now = _READ_F(_OF_F) + _READ_T(_OF_T)
    except KeyError:  # one of them is gone
        return True
    return not (all(map(_is, now, _THEN)) and (_OF_TENSOR.keys().isdisjoint(_NAMES) or _are_inherited()))


def are_patched_as_traced() -> bool:
    """The same for torch.compile, which guards what it is told of one by one."""
    return any(
        getattr(held.holder, name) is not then
        for held in _WATCHED
        for name, then in zip(held.names, held.then, strict=True)
    )


def _are_inherited() -> bool:
    """Whether what Tensor has of its own under these names is what it would inherit."""
    return all(_OF_TENSOR.get(name, then) is then for name, then in _INHERITED.items())
