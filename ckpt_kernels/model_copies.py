"""Copies of models and of what they are called with, to be run in the place of these."""

import copy
from typing import Any

from torch import Tensor, nn

from .nested_values import tensors_in


def copy_of(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy, whatever attributes it has: of a tensor with a graph, which cannot be copied, the values; of another
    thing that cannot be copied, a lock or a generator, that thing itself. A `memo` has what takes the place of things,
    by their identity."""
    memo = {} if memo is None else memo
    for module in nn.Module.modules(model):  # whatever attributes the model has under that name
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                deep_copied(value, memo)
    return copy.deepcopy(model, memo)


def copy_sharing_parameters(model: nn.Module) -> nn.Module:
    """A copy whose parameters are others in the same memory: they have gradients and hooks of their own."""
    memo: dict[int, Any] = {}
    for module in nn.Module.modules(model):
        for parameter in module._parameters.values():
            if parameter is not None:
                memo[id(parameter)] = _alias(parameter)
    return copy_of(model, memo)


def _alias(parameter: nn.Parameter) -> Any:
    """Another parameter of that class, and with its attributes, in the same memory."""
    data = parameter.detach()
    if (type(data) is type(parameter) and type(data) is not nn.Parameter) or type(data) is Tensor:
        alias: Any = Tensor._make_subclass(type(parameter), data, parameter.requires_grad)
    else:
        alias = nn.Parameter(data, parameter.requires_grad)
    vars(alias).update(vars(parameter))
    return alias


def deep_copied(value: Any, memo: dict[int, Any]) -> Any:
    """A deep copy, of tensors that cannot be copied their values; the thing itself where it cannot be copied."""
    for tensor in tensors_in(value):
        if not tensor.is_leaf or tensor.is_inference():
            memo[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
    try:
        return copy.deepcopy(value, memo)
    except Exception:
        memo[id(value)] = value
        return value
