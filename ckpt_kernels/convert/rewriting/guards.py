"""What the modules and tensors at a site are: known, called plainly, fitting. Everything else is None, or False."""

import sys
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...autocast import is_autocast
from ..attribute_loads import LOADS_PLAINLY, only_instances_define
from ..code.call_graph import is_unpatched
from ..native_guards import ModuleGuard, linear_parameters_natively
from ..operands import (
    CALLS_FORWARD,
    HOOKS,
    class_calls_forward,
    is_called_plainly,
    is_ordinary,
    is_plain_instance,
    matches_input,
)
from ..rules.norms import Norm
from ..swap import original_of, rule_in_force

_F_DROPOUT = nn.functional.dropout
CHUNK = torch.chunk
_DICTS = (dict, OrderedDict)
_CONV1D = "transformers.pytorch_utils"
_FORWARD, _DROPOUT = nn.Linear.forward, nn.Dropout.forward
# None, which no code is, where somebody has put another forward in torch's place.
_CODE, _DROPOUT_CODE = (f.__code__ if is_unpatched(f) else None for f in (_FORWARD, _DROPOUT))
# All that `linear_operands` asks of most layers.
LINEAR = ModuleGuard(
    nn.Linear,
    (("forward", _FORWARD), *CALLS_FORWARD, *LOADS_PLAINLY),
    ((_FORWARD, "__code__", _CODE),),
    ("weight", "bias"),
    HOOKS,
    ("forward", "weight", "bias"),
)


def is_linear(module: Any) -> bool:
    """Whether it computes what `torch.nn.Linear` does, or the same with its weight transposed (GPT-2's Conv1D): by
    the code that its forward is.

    A class that computes its weight at each load, as those of parametrized modules do, is none.
    """
    if isinstance(module, nn.Linear):
        kind = type(module)
        own = kind.forward is _FORWARD and _FORWARD.__code__ is _CODE
        return own and only_instances_define(kind, "weight", "bias")
    return isinstance(module, nn.Module) and _is_transposed(module)


def _is_transposed(module: nn.Module) -> bool:
    """Whether its forward is that of transformers' Conv1D, and what transformers' file has there."""
    kind: Any = type(module)
    forward = kind.forward
    code = getattr(forward, "__code__", None)
    if code is None or forward.__qualname__ != "Conv1D.forward" or forward.__module__ != _CONV1D:
        return False
    file = getattr(sys.modules.get(_CONV1D), "__file__", None)
    as_written = code.co_name == "forward" and code.co_filename == file and not forward.__defaults__
    return (
        as_written and forward.__globals__.get("torch") is torch and only_instances_define(kind, "weight", "bias", "nf")
    )


def linear_operands(modules: Sequence[Any], input: Tensor) -> list[tuple[Tensor, Tensor | None]] | None:
    """Weights and biases as F.linear takes them, if there is nothing else to the modules and they are of the input's
    kind."""
    surely = linear_parameters_natively(modules, LINEAR, input)
    return surely if surely is not None else linear_operands_in_python(modules, input)


def linear_operands_in_python(modules: Sequence[Any], input: Tensor) -> list[tuple[Tensor, Tensor | None]] | None:
    """The same in Python, with what is rare."""
    found: list[tuple[Tensor, Tensor | None]] = []
    kind, transposed = None, False
    for module in modules:
        if type(module) is not kind:  # a class is asked once
            kind, transposed = type(module), not isinstance(module, nn.Linear)
            if not is_linear(module) or not class_calls_forward(kind):
                return None
        if not is_plain_instance(module):
            return None
        own = module.__dict__
        held = own["_parameters"]
        if type(held) not in _DICTS:  # of which each load may run code
            return None
        # `module.weight` would cost as much as all that is checked here.
        if "weight" in held and "bias" in held and "weight" not in own and "bias" not in own:
            weight, bias = held["weight"], held["bias"]
        else:  # buffers, tensors that sharding puts in the place of parameters, or what somebody has laid over them
            weight, bias = module.weight, module.bias
        if not (matches_input(weight, input) or _may_be_cast(weight, input)) or weight.dim() != 2:
            return None
        if bias is not None:
            fits = matches_input(bias, input) or _may_be_cast(bias, input)
            if not fits or bias.shape != weight.shape[1 if transposed else 0 :][:1]:
                return None
        if transposed:
            # What cannot be viewed, or as another shape, is theirs to refuse.
            if bias is None or weight.shape[1] != own.get("nf") or not input.is_contiguous():
                return None
            weight = weight.t()
        found.append((weight, bias))
    return found


def _may_be_cast(tensor: Any, input: Tensor) -> bool:
    """Whether autocast gives it the dtype of the input."""
    return is_autocast(input) and is_ordinary(tensor) and tensor.device == input.device


def autocast_input(input: Tensor) -> Tensor:
    """Under autocast, the copy that torch's linear layers make of their input, and keep."""
    if not is_autocast(input) or input.dtype == torch.float64:
        return input
    return input.to(torch.get_autocast_dtype(input.device.type))


def share_gradient_need(input: Tensor, *linears: tuple[Tensor, Tensor | None]) -> bool:
    """Whether all products have gradients, or none: what eager torch keeps of a gate depends on that."""
    return input.requires_grad or not torch.is_grad_enabled() or all(w.requires_grad for w, _ in linears)


def level_for_weights(recompute: str, *linears: tuple[Tensor, Tensor | None]) -> str:
    """ "output" in the place of "all" where a weight is frozen, for which eager torch does not keep the input."""
    if recompute != "all":
        return recompute
    return "all" if all(weight.requires_grad for weight, _ in linears) else "output"


def are_chained(input: Tensor, firsts: tuple, lasts: tuple, parts: int = 1) -> bool:
    fits = input.dim() > 0 and firsts[0].shape[1] == input.shape[-1]
    return fits and firsts[0].shape[0] == parts * lasts[0].shape[1]


def norm_rule(module: Any) -> Norm | None:
    rule = rule_in_force(module) if isinstance(module, nn.Module) else None
    return rule if isinstance(rule, Norm) else None


def dropout_probability(drop: Any, p: Any, training: Any) -> float | None:
    """That of a dropout which is called with these; None where it is another, or more."""
    if drop is _F_DROPOUT:
        return (float(p) if training else 0.0) if type(p) is float and type(training) is bool and 0 <= p <= 1 else None
    module = original_of(drop) is nn.Dropout and is_called_plainly(drop)
    if not module or drop.inplace is not False or type(drop.training) is not bool:
        return None
    if nn.Dropout.forward is not _DROPOUT or _DROPOUT.__code__ is not _DROPOUT_CODE:
        return None
    if type(drop.p) not in (float, int) or not 0 <= drop.p <= 1:
        return None
    return float(drop.p) if drop.training else 0.0


def have_same_layout(tensor: Tensor, other: Tensor) -> bool:
    return tensor.shape == other.shape and tensor.dtype == other.dtype and tensor.device == other.device


def is_per_sample(tensor: Any, input: Tensor) -> bool:
    """Whether it is one for each sample: (B, 1, N) or (B, T, N) beside an input (B, T, N), or (B, N) beside (B, N)."""
    if tensor is None or tensor.dim() != input.dim() or tensor.dtype != input.dtype or tensor.device != input.device:
        return False
    samples, lead = list(tensor.shape[:-1]), list(input.shape[:-1])
    while samples and samples[-1] == 1 and lead[len(samples) - 1] != 1:
        samples.pop()
    return tensor.shape[-1] == input.shape[-1] and samples == lead[: len(samples)]
