"""The rule for heads of language models, whose logits a loss reads in chunks instead of as a whole."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...autocast import is_autocast
from ...logits import logits_of
from ...ops.products import product_dtype
from ..module_tree import named_modules, names_fitting
from ..operands import has_global_hooks, is_called_plainly, is_operand, is_ordinary
from ..swap import original_of
from .rule import Forward, Rule


@dataclass(frozen=True)
class Head(Rule):
    """The rule for a linear layer that returns logits which are computed when they are first read."""

    description = "logits computed when first read"

    def methods(self, original: type[nn.Module]) -> Mapping[str, Forward]:
        def forward(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
            operands = None
            # Without gradients, and within an autograd.Function, the logits are computed at once.
            if len(args) == 1 and not kwargs and torch.is_grad_enabled() and not torch.compiler.is_compiling():
                operands = _operands(module, args[0])
            return original.forward(module, *args, **kwargs) if operands is None else logits_of(*operands)

        return {"forward": forward}


def heads_in(model: nn.Module, name: str | None) -> dict[str, nn.Module]:
    """The linear layers whose full names match the name, with * and ?.

    Raises ValueError for a name that fits no linear layer, or fits another module; TypeError for anything but a string.
    """
    if name is None:
        return {}
    if not isinstance(name, str):
        raise TypeError(f"logits is {type(name).__name__}; expected the name of a linear layer, or None")
    modules = dict(named_modules(model))
    fitting = {full: modules[full] for full in names_fitting(modules, name)}
    if not fitting or not all(map(_is_linear, fitting.values())):
        matches = (
            ", ".join(f"{full or 'the model'} ({type(module).__name__})" for full, module in fitting.items())
            or "no module"
        )
        raise ValueError(f"logits names {name!r}, which fits {matches}; expected the name of a torch.nn.Linear")
    return fitting


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and original_of(module).forward is nn.Linear.forward


def _operands(module: nn.Module, input: Any) -> tuple[Tensor, Tensor, Tensor | None, torch.dtype] | None:
    """Input, weight, bias and the result's dtype, if the call computes a matrix product and nothing else."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if "parametrizations" in module._modules or "weight" in module.__dict__ or "bias" in module.__dict__:
        return None
    if has_global_hooks() or not is_called_plainly(module) or not is_operand(input):
        return None
    for parameter in (weight, bias):
        if parameter is not None and (not is_ordinary(parameter) or parameter.device != input.device):
            return None
    tensors = [t for t in (input, weight, bias) if t is not None]
    dtype = product_dtype(input)
    # Autocast casts all tensors but those of float64.
    is_cast = is_autocast(input) and all(t.dtype != torch.float64 for t in tensors)
    if weight is None or input.dim() < 2 or weight.shape[0] < 2 or weight.shape[1:] != input.shape[-1:]:
        return None
    if (
        not (is_cast or all(t.dtype == dtype for t in tensors))
        or any(t.is_inference() for t in tensors)
        or not any(t.requires_grad for t in tensors)
    ):
        return None
    return input, weight, bias, dtype
