"""Guards: checks of the modules and tensors at a call site before a fused call.

A guard returns None or False for everything that the fused op does not support.
"""

import sys
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...autocast import is_autocast
from ..attribute_loads import LOADS_PLAINLY, only_instances_define
from ..native_guards import ModuleGuard, linear_parameters_natively
from ..operands import (
    CALLS_FORWARD,
    FORWARDS,
    HOOKS,
    class_calls_forward,
    is_called_plainly,
    is_ordinary,
    is_plain_instance,
    matches_input,
)
from ..rules.norms import Norm
from ..rules.pointwise import probability_of
from ..swap import original_of, rule_in_force

_F_DROPOUT = nn.functional.dropout
_DICTS = (dict, OrderedDict)
_CONV1D = "transformers.pytorch_utils"
# None, which no code object is, if torch's forward was patched before this package was imported.
_FORWARD, _CODE = FORWARDS.get(nn.Linear, (nn.Linear.forward, None))
_DROPOUT, _DROPOUT_CODE = FORWARDS.get(nn.Dropout, (nn.Dropout.forward, None))
# All that `linear_operands` checks for most layers.
LINEAR = ModuleGuard(
    nn.Linear,
    (("forward", _FORWARD), *CALLS_FORWARD, *LOADS_PLAINLY),
    ((_FORWARD, "__code__", _CODE),),
    ("weight", "bias"),
    HOOKS,
    ("forward", "weight", "bias"),
)


def is_linear(module: Any) -> bool:
    """Whether a module's forward is that of `torch.nn.Linear`, or of GPT-2's Conv1D, whose weight is transposed.

    A class that computes the weight at each load, such as that of a parametrized module, does not count.
    """
    if isinstance(module, nn.Linear):
        kind = type(module)
        is_original = kind.forward is _FORWARD and _FORWARD.__code__ is _CODE
        return is_original and only_instances_define(kind, "weight", "bias")
    return isinstance(module, nn.Module) and _is_transposed(module)


def _is_transposed(module: nn.Module) -> bool:
    """Whether a module's forward is that of transformers' Conv1D, and is unpatched."""
    kind: Any = type(module)
    forward = kind.forward
    code = getattr(forward, "__code__", None)
    if code is None or forward.__qualname__ != "Conv1D.forward" or forward.__module__ != _CONV1D:
        return False
    file = getattr(sys.modules.get(_CONV1D), "__file__", None)
    is_original = code.co_name == "forward" and code.co_filename == file and not forward.__defaults__
    is_original = is_original and forward.__globals__.get("torch") is torch
    return is_original and only_instances_define(kind, "weight", "bias", "nf")


def linear_operands(modules: Sequence[Any], input: Tensor) -> list[tuple[Tensor, Tensor | None]] | None:
    """The weights and biases of linear layers as F.linear takes them, None if F.linear would not compute the same.

    Reasons are hooks, other classes, or parameters whose dtype or device differs from the input's.
    """
    native = linear_parameters_natively(modules, LINEAR, input)
    return native if native is not None else linear_operands_in_python(modules, input)


def linear_operands_in_python(modules: Sequence[Any], input: Tensor) -> list[tuple[Tensor, Tensor | None]] | None:
    """`linear_operands` in Python, which also covers rare cases."""
    pairs: list[tuple[Tensor, Tensor | None]] = []
    kind, transposed = None, False
    for module in modules:
        if type(module) is not kind:  # check each class only once
            kind, transposed = type(module), not isinstance(module, nn.Linear)
            if not is_linear(module) or not class_calls_forward(kind):
                return None
        if not is_plain_instance(module):
            return None
        own = module.__dict__
        parameters = own["_parameters"]
        if type(parameters) not in _DICTS:  # a subclass may run code at each load
            return None
        # Loading `module.weight` would take as long as all other checks here.
        if "weight" in parameters and "bias" in parameters and "weight" not in own and "bias" not in own:
            weight, bias = parameters["weight"], parameters["bias"]
        else:  # buffers, tensors that replace parameters under sharding, or instance attributes that shadow parameters
            weight, bias = module.weight, module.bias
        if not (matches_input(weight, input) or _may_be_cast(weight, input)) or weight.dim() != 2:
            return None
        if bias is not None:
            fits = matches_input(bias, input) or _may_be_cast(bias, input)
            if not fits or bias.shape != weight.shape[1 if transposed else 0 :][:1]:
                return None
        if transposed:
            # Conv1D views its input, and raises where the input cannot be viewed.
            if bias is None or weight.shape[1] != own.get("nf") or not input.is_contiguous():
                return None
            weight = weight.t()
        pairs.append((weight, bias))
    return pairs


def _may_be_cast(tensor: Any, input: Tensor) -> bool:
    """Whether autocast casts a parameter to the dtype of the input."""
    return is_autocast(input) and is_ordinary(tensor) and tensor.device == input.device


def autocast_input(input: Tensor) -> Tensor:
    """The input, under autocast as the copy in the autocast dtype that torch's linear layers make and save."""
    if not is_autocast(input) or input.dtype == torch.float64:
        return input
    return input.to(torch.get_autocast_dtype(input.device.type))


def share_gradient_need(input: Tensor, *linears: tuple[Tensor, Tensor | None]) -> bool:
    """Whether all products need gradients, or none: what eager torch saves for a gate depends on that."""
    return input.requires_grad or not torch.is_grad_enabled() or all(w.requires_grad for w, _ in linears)


def level_for_weights(recompute: str, *linears: tuple[Tensor, Tensor | None]) -> str:
    """The level, with "output" for "all" if all weights are frozen and the linear layers' input is larger than the
    products that run again: eager torch does not save the input of a frozen layer."""
    if recompute != "all" or any(weight.requires_grad for weight, _ in linears):
        return recompute
    return "all" if linears[0][0].shape[1] <= sum(weight.shape[0] for weight, _ in linears) else "output"


def are_chained(input: Tensor, firsts: tuple, lasts: tuple, parts: int = 1) -> bool:
    """Whether the shapes of two linear layers fit; the first layer packs `parts` inputs of the last."""
    first_fits = input.dim() > 0 and firsts[0].shape[1] == input.shape[-1]
    return first_fits and firsts[0].shape[0] == parts * lasts[0].shape[1]


def norm_rule(module: Any) -> Norm | None:
    """The rule that computes a converted norm, None for other modules."""
    rule = rule_in_force(module) if isinstance(module, nn.Module) else None
    return rule if isinstance(rule, Norm) else None


def dropout_probability(drop: Any, p: Any, training: Any) -> float | None:
    """The probability with which a dropout, module or `F.dropout`, drops elements; None for other callees."""
    if drop is _F_DROPOUT:
        return (float(p) if training else 0.0) if type(p) is float and type(training) is bool and 0 <= p <= 1 else None
    is_dropout = original_of(drop) is nn.Dropout and is_called_plainly(drop)
    if not is_dropout or drop.inplace is not False or type(drop.training) is not bool:
        return None
    if nn.Dropout.forward is not _DROPOUT or _DROPOUT.__code__ is not _DROPOUT_CODE:
        return None
    p = probability_of(drop)
    return p if p is None or drop.training else 0.0


def have_same_shape_dtype_device(tensor: Tensor, other: Tensor) -> bool:
    return tensor.shape == other.shape and tensor.dtype == other.dtype and tensor.device == other.device


def is_per_sample(tensor: Tensor, input: Tensor) -> bool:
    """Whether a scale or shift has one row for each sample.

    The shapes are (B, 1, N) or (B, T, N) for an input (B, T, N), and (B, N) for (B, N).
    """
    if tensor.dim() != input.dim() or tensor.dtype != input.dtype or tensor.device != input.device:
        return False
    samples, lead = list(tensor.shape[:-1]), list(input.shape[:-1])
    while samples and samples[-1] == 1 and lead[len(samples) - 1] != 1:
        samples.pop()
    return tensor.shape[-1] == input.shape[-1] and samples == lead[: len(samples)]
