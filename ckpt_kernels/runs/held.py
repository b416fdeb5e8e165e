"""The tensors and generators that a layer holds, found in one walk at each call: a layer may change between calls."""

import collections
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

# Types of attributes that are certainly no generators. To ask `isinstance` of each attribute takes long.
_OTHER_TYPES = frozenset({type(None), bool, int, float, str, tuple, list, dict, collections.OrderedDict, set})


class Held(NamedTuple):
    """What a layer and the modules below hold.

    Attributes:
        parameters: the parameters.
        buffers: each buffer, with the module that it belongs to.
        generators: the generators among the modules' attributes.
    """

    parameters: list[nn.Parameter]
    buffers: list[tuple[Tensor, nn.Module]]
    generators: list[torch.Generator]


def held_by(layer: nn.Module) -> Held | None:
    """Return what a layer holds; None if a parameter or buffer is lazy, and so has no value yet."""
    held = parameters, buffers, generators = Held([], [], [])
    modules, seen = [layer], set()
    for module in modules:
        if module in seen:
            continue
        seen.add(module)
        modules += [child for child in module._modules.values() if child is not None]
        for parameter in module._parameters.values():
            if parameter is not None:
                parameters.append(parameter)
        for buffer in module._buffers.values():
            if buffer is not None:
                buffers.append((buffer, module))
        for value in vars(module).values():
            if type(value) not in _OTHER_TYPES and isinstance(value, torch.Generator):
                generators.append(value)
    is_any_lazy = any(map(is_lazy, parameters)) or any(is_lazy(buffer) for buffer, _ in buffers)
    return None if is_any_lazy else held
