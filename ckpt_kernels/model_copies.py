"""Deep copies of models and of their arguments, also of those that `copy.deepcopy` refuses."""

import copy
from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from .nested_values import tensors_in


def copy_of(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy of a model, whatever attributes the model has.

    A tensor with an autograd graph cannot be deep-copied: the copy has its values. Any other object that cannot be
    copied, such as a lock or a generator, is shared. `memo` maps identities of objects to their replacements.
    """
    memo = {} if memo is None else memo
    for module in nn.Module.modules(model):  # the model may have another attribute of that name
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                deep_copied(value, memo)
    return copy.deepcopy(model, memo)


def copy_sharing_parameters(model: nn.Module, written: Collection[nn.Parameter] = ()) -> nn.Module:
    """A copy whose parameters are new objects in the same memory, with gradients and hooks of their own.

    The parameters in `written`, which the model's forward writes to, have memory of their own.
    """
    copied = set(map(id, written))
    memo: dict[int, Any] = {}
    for module in nn.Module.modules(model):
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in copied:
                memo[id(parameter)] = _alias(parameter)
    return copy_of(model, memo)


def _alias(parameter: nn.Parameter) -> Any:
    """A parameter of the same class and with the same attributes, in the same memory."""
    data = parameter.detach()
    if (type(data) is type(parameter) and type(data) is not nn.Parameter) or type(data) is Tensor:
        alias: Any = Tensor._make_subclass(type(parameter), data, parameter.requires_grad)
    else:
        alias = nn.Parameter(data, parameter.requires_grad)
    vars(alias).update(vars(parameter))
    return alias


def deep_copied(value: Any, memo: dict[int, Any]) -> Any:
    """A deep copy. Tensors that cannot be copied are cloned, any other object that cannot be copied is shared."""
    for tensor in tensors_in(value):
        if not tensor.is_leaf or tensor.is_inference():
            memo[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
    try:
        return copy.deepcopy(value, memo)
    except Exception:
        memo[id(value)] = value
        return value
