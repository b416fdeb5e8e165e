"""The tensors and generators that a layer holds, found in one walk at each call: a layer may change between calls."""

import collections
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..random_state import generator_types
from ..thin import direct
from .module_state import CONTAINERS, NOT_HELD, OF_TORCH, Copies, ModuleStates, copies_of

# Types of attributes that are no generators, and of parameters and buffers that are not lazy. One set operation over
# all types takes less time than to ask `isinstance` of each value.
_OTHER_TYPES = frozenset({type(None), bool, int, float, str, tuple, list, dict, collections.OrderedDict, set})
_NOT_LAZY = frozenset({Tensor, nn.Parameter})


class Held(NamedTuple):
    """What a layer and the modules below hold.

    Attributes:
        parameters: the parameters.
        buffers: each buffer, and each tensor without a graph among the attributes, with the module it belongs to.
        generators: the generators of torch, Python and numpy among the modules' attributes.
        states: the state of the modules.
    """

    parameters: list[nn.Parameter]
    buffers: list[tuple[Tensor, nn.Module]]
    generators: list[Any]
    states: ModuleStates


def held_by(layer: nn.Module) -> Held | None:
    """Return what a layer holds; None for a layer that must not run again.

    A lazy parameter or buffer has no value yet. A scripted or traced module optimizes its code as it runs, and then
    saves other tensors.
    """
    if direct.thin_module is not None:
        found = direct.thin_module.held(layer, CONTAINERS, OF_TORCH, Tensor, generator_types(), NOT_HELD)
        if found is not None:
            modules_found, parameters_found, buffers_found, generators_found, copies = found
            states = ModuleStates(modules_found, parameters_found, Copies(*copies))
            return Held(parameters_found, buffers_found, generators_found, states)
    parameters: list[nn.Parameter | None] = []
    buffers: list[tuple[Tensor, nn.Module]] = []
    generators: list[Any] = []
    modules: list[nn.Module] = [layer]
    seen: dict[nn.Module, None] = {}
    for module in modules:
        if module in seen:
            continue
        if isinstance(module, torch.jit.ScriptModule):
            return None
        seen[module] = None
        parameters += module._parameters.values()
        if module._buffers:
            buffers += [(buffer, module) for buffer in module._buffers.values() if buffer is not None]
        if module._modules:
            modules += [child for child in module._modules.values() if child is not None]
        own = vars(module).values()
        if not _OTHER_TYPES.issuperset(map(type, own)):
            generators += [value for value in own if isinstance(value, generator_types())]
            tensors = [
                value for key, value in vars(module).items() if isinstance(value, Tensor) and key not in OF_TORCH
            ]
            buffers += [(tensor, module) for tensor in tensors if tensor.grad_fn is None]
    initialized = [parameter for parameter in parameters if parameter is not None]
    found = Held(initialized, buffers, generators, ModuleStates(list(seen), initialized, copies_of(list(seen))))
    return None if _is_any_lazy(found.parameters) or _is_any_lazy([buffer for buffer, _ in buffers]) else found


def _is_any_lazy(tensors: Sequence[Tensor]) -> bool:
    return not _NOT_LAZY.issuperset(map(type, tensors)) and any(map(is_lazy, tensors))
