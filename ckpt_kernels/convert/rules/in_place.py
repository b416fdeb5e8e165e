"""Torch's activations that write over their input.

Some save a clone of the input for backward, from which the output can be recomputed. But where the input is a matrix
product of more than two dimensions, which is a view, the autograd graph does not show the clone's origin. Computed out
of place, such an activation saves the product itself, and no more memory is kept.

A write over a view of a norm's output, whose channels a permutation moved, stays a write, because other code may read
the memory. The recipe of the norm's output then follows the write.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import recompute
from ..operands import has_global_hooks, is_called_plainly, is_operand
from ..swap import original_of
from .pointwise import is_unmodified_torch

# The functions out of place, and the names of the modules' settings that are their other arguments.
_OUT_OF_PLACE: dict[type[nn.Module], tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    nn.ELU: (F.elu, ("alpha",)),
    nn.Hardsigmoid: (F.hardsigmoid, ()),
    nn.Hardswish: (F.hardswish, ()),
    nn.Hardtanh: (F.hardtanh, ("min_val", "max_val")),
    nn.LeakyReLU: (F.leaky_relu, ("negative_slope",)),
    nn.Mish: (F.mish, ()),
    nn.ReLU: (F.relu, ()),
    nn.ReLU6: (F.relu6, ()),
    nn.SiLU: (F.silu, ()),
}
# Those that save a clone, and are none of our activations, or are one at some settings only.
_SAVING_CLONES = (nn.Hardsigmoid, nn.Hardtanh, nn.ReLU6)
_SETTINGS = tuple({name: None for _, names in _OUT_OF_PLACE.values() for name in names})


def writes_over(module: Any) -> bool:
    """Whether the module is one of these activations with `inplace=True`, unmodified, and saves a clone."""
    return _is_in_place(module) and original_of(module) in _SAVING_CLONES


def _is_in_place(module: Any) -> bool:
    if not isinstance(module, nn.Module) or original_of(module) not in _OUT_OF_PLACE:
        return False
    return module.__dict__.get("inplace") is True and is_unmodified_torch(module, *_SETTINGS)


def _computing(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The function out of place, with the module's settings of now; None for settings that are no numbers."""
    function, names = _OUT_OF_PLACE[original_of(module)]
    settings = {name: getattr(module, name) for name in names}
    if not all(type(setting) in (int, float) for setting in settings.values()):
        return None
    return functools.partial(function, **settings)


def out_of_place(module: Any) -> Callable[[Tensor], Tensor] | None:
    """The function that computes the module's output without a write to the input; None for modules that do not
    `writes_over`."""
    return _computing(module) if writes_over(module) and is_called_plainly(module) else None


def following_writes(called: Any) -> Any:
    """An activation that writes over its input, for views of outputs that have recipes; anything else unchanged."""
    if torch.compiler.is_compiling() or not recompute.is_active() or not _is_in_place(called):
        return called

    def call(*args: Any, **kwargs: Any) -> Any:
        is_view = len(args) == 1 and not kwargs and type(args[0]) is Tensor and args[0]._base is not None
        if not is_view or not is_operand(args[0]) or has_global_hooks() or not is_called_plainly(called):
            return called(*args, **kwargs)
        compute = _computing(called)
        return called(args[0]) if compute is None else recompute.write_over_view(called, compute, args[0])

    return call
