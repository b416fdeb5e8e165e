"""Finds the layers of a model: the modules for which a plan chooses levels, and to which the level "layer" applies."""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from .attribute_loads import is_set
from .code.call_graph import stores_attributes
from .module_tree import children_of, initialized_parameters, modules_of, named_modules
from .rules.likeness import NORMS
from .rules.norms import Norm
from .selection import inspected_modules
from .swap import may_be_swapped, rule_of

_LISTS = (nn.ModuleList, nn.Sequential)


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The layers by name, in the order of the model's modules.

    A layer is a member of a `ModuleList` or `Sequential` that holds at least two matrices and a norm (in a model
    without norms, at least two matrices), whose class may be exchanged, and which does not consist for the most part of
    layers in lists inside. Where no list has such members, the layers are the members of the longest list.
    """
    names = {module: name for name, module in named_modules(model)}
    has_norms = any(map(_is_norm, names))
    inspected = inspected_modules(model)

    def takes_context(module: nn.Module) -> bool:
        if not has_forward(module) or isinstance(module, nn.ModuleList) or module in inspected:
            return False
        return may_be_swapped(module)

    def is_layer(module: nn.Module) -> bool:
        if count_matrices(module) < 2 or not takes_context(module):
            return False
        return not has_norms or any(map(_is_norm, modules_of(module)))

    layers = list(_layers_in(model, is_layer, {model}))
    if not layers:
        lists = [children_of(module) for module in names if isinstance(module, _LISTS)]
        longest: list[nn.Module] = max(lists, key=len, default=[])
        layers = [member for member in longest if takes_context(member)]
    order = {module: place for place, module in enumerate(names)}
    return {names[module]: module for module in sorted(dict.fromkeys(layers), key=order.__getitem__)}


def _layers_in(module: nn.Module, is_layer: Callable[[nn.Module], bool], around: set[nn.Module]) -> Iterator[nn.Module]:
    """The layers below a module. Layers inside a layer replace the outer one where they hold half of the parameters.

    `around` is the module and those that contain it: modules may contain each other.
    """
    for child in children_of(module):
        if child in around:
            continue
        within = _layers_in(child, is_layer, around | {child})
        if not (isinstance(module, _LISTS) and is_layer(child)):
            yield from within
            continue
        inner = list(within)
        if inner and 2 * sum(map(_size, inner)) >= _size(child):
            yield from inner
        else:
            yield child


def _is_norm(module: nn.Module) -> bool:
    rule = rule_of(module)
    if rule is not None:
        return isinstance(rule, Norm)
    return isinstance(module, NORMS)


def count_matrices(module: nn.Module) -> int:
    """The number of parameters that are longer than 1 along several dimensions, unlike a norm's weight."""
    return sum(sum(size > 1 for size in p.shape) > 1 for p in initialized_parameters(module))


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in initialized_parameters(module))


def above_lists(model: nn.Module) -> dict[nn.Module, None]:
    """The model, and all modules that contain one of the model's outermost `ModuleList`s."""
    above: dict[nn.Module, None] = {}
    _holds_list(model, set(), above)
    return {model: None} | above


def _holds_list(module: nn.Module, seen: set[nn.Module], above: dict[nn.Module, None]) -> bool:
    """Whether a module contains a `ModuleList`. Such modules are added to `above`."""
    if module in seen:
        return module in above
    seen.add(module)
    children = children_of(module)
    lists = [isinstance(child, nn.ModuleList) or _holds_list(child, seen, above) for child in children]
    if any(lists):
        above[module] = None
    return any(lists)


def has_forward(module: nn.Module) -> bool:
    """Whether the module has a forward in Python, unlike a list of modules, or a scripted or traced module."""
    return not isinstance(module, torch.jit.ScriptModule) and type(module).forward is not nn.Module.forward


def may_not_repeat(module: nn.Module) -> bool:
    """Whether the module may write to the input, to running statistics or to attributes, which must not happen twice.

    Under torch.compile a checkpoint with such writes is an error, or breaks the graph.
    """
    return is_set(module, "inplace") or is_set(module, "track_running_stats") or stores_attributes(type(module))
