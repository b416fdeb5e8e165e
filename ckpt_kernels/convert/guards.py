"""What the modules and tensors at a site are: known, called plainly, fitting. Everything else is None, or False."""

from typing import Any

import torch
from torch import Tensor, nn

from .called import is_as_torch_wrote_it
from .norms import Norm
from .operands import is_called_plainly, is_ordinary
from .swap import original_of, rule_in_force

_F_DROPOUT = nn.functional.dropout


def is_linear(module: Any) -> bool:
    """Whether it computes what `torch.nn.Linear` does, or the same with its weight transposed (GPT-2's Conv1D)."""
    if isinstance(module, nn.Linear):
        kind = type(module)
        own = kind.forward is nn.Linear.forward and is_as_torch_wrote_it(nn.Linear.forward)
        return own and not _computes_its_weight(kind)
    return isinstance(module, nn.Module) and _transposed(module)


def _computes_its_weight(kind: type[nn.Module]) -> bool:
    """At each load, as classes of parametrized modules do."""
    if kind is nn.Linear:
        return False
    own = kind.__getattr__ is nn.Module.__getattr__ and kind.__getattribute__ is nn.Module.__getattribute__
    return not own or hasattr(kind, "weight") or hasattr(kind, "bias")


def _transposed(module: nn.Module) -> bool:
    if type(module).__module__ != "transformers.pytorch_utils" or type(module).__name__ != "Conv1D":
        return False
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    shape = getattr(module, "nx", None), getattr(module, "nf", None)
    return weight is not None and bias is not None and tuple(weight.shape) == shape and bias.shape == shape[1:]


def linear_operands(module: Any, input: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias as F.linear takes them, if there is nothing else to it and they are of the input's kind."""
    if not is_linear(module) or not is_called_plainly(module):
        return None
    held = module._parameters
    if "weight" in held and "bias" in held:  # `module.weight` would cost as much as all that is checked here
        weight, bias = held["weight"], held["bias"]
    else:  # buffers, or tensors that sharding puts in the place of parameters
        weight, bias = module.weight, module.bias
    if not is_ordinary(weight) or weight.dim() != 2 or weight.device != input.device:
        return None
    transposed = not isinstance(module, nn.Linear)
    if not (bias is None or (is_ordinary(bias) and bias.shape == weight.shape[1 if transposed else 0 :][:1])):
        return None
    same = weight.dtype == input.dtype and (bias is None or bias.dtype == input.dtype)
    if not same and not torch.is_autocast_enabled(input.device.type):
        return None
    return (weight.t() if transposed else weight), bias


def as_products_take(input: Tensor) -> Tensor:
    """Under autocast, the copy that torch's linear layers make of their input, and keep."""
    device = input.device.type
    if not torch.is_autocast_enabled(device) or input.dtype == torch.float64:
        return input
    return input.to(torch.get_autocast_dtype(device))


def are_wanted(input: Tensor, *linears: tuple[Tensor, Tensor | None]) -> bool:
    """Whether all products have gradients, or none: what eager torch keeps of a gate depends on that."""
    return not torch.is_grad_enabled() or input.requires_grad or all(w.requires_grad for w, _ in linears)


def level_for(recompute: str, *linears: tuple[Tensor, Tensor | None]) -> str:
    """ "output" in the place of "all" where a weight is frozen, for which eager torch does not keep the input."""
    frozen = recompute == "all" and not all(weight.requires_grad for weight, _ in linears)
    return "output" if frozen else recompute


def chains(input: Tensor, firsts: tuple, lasts: tuple, parts: int = 1) -> bool:
    fits = input.dim() > 0 and firsts[0].shape[1] == input.shape[-1]
    return fits and firsts[0].shape[0] == parts * lasts[0].shape[1]


def norm_rule(module: Any) -> Norm | None:
    rule = rule_in_force(module) if isinstance(module, nn.Module) else None
    return rule if isinstance(rule, Norm) else None


def probability(drop: Any, p: Any, training: Any) -> float | None:
    if drop is None:
        return 0.0
    if drop is _F_DROPOUT:
        return (float(p) if training else 0.0) if type(p) is float and type(training) is bool and 0 <= p <= 1 else None
    module = original_of(drop) is nn.Dropout and is_called_plainly(drop)
    if not module or drop.inplace or not is_as_torch_wrote_it(nn.Dropout.forward):
        return None
    if not isinstance(drop.p, float | int) or not 0 <= drop.p <= 1:
        return None
    return float(drop.p) if drop.training else 0.0


def are_alike(tensor: Tensor, other: Tensor) -> bool:
    return tensor.shape == other.shape and tensor.dtype == other.dtype and tensor.device == other.device


def modulates(tensor: Any, input: Tensor) -> bool:
    """Whether it is one for each sample: (B, 1, N) or (B, T, N) beside an input (B, T, N), or (B, N) beside (B, N)."""
    if tensor is None or tensor.dim() != input.dim() or tensor.dtype != input.dtype or tensor.device != input.device:
        return False
    samples, lead = list(tensor.shape[:-1]), list(input.shape[:-1])
    while samples and samples[-1] == 1 and lead[len(samples) - 1] != 1:
        samples.pop()
    return tensor.shape[-1] == input.shape[-1] and samples == lead[: len(samples)]
