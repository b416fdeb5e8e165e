"""Which modules of a model are its layers: what a plan chooses for, and what the level "layer" is of."""

from collections.abc import Callable, Iterator

from torch import nn

from .attribute_loads import is_set
from .module_tree import modules_of, named_modules
from .rules.norms import Norm
from .swap import may_be_swapped, rule_of

_LISTS = (nn.ModuleList, nn.Sequential)


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The layers by name, in the order of the model's modules.

    A layer is a member of a `ModuleList` or `Sequential` that holds at least two matrices and a norm (of a model
    without norms: two matrices), whose forward may run in another way, and which has no lists of layers in it that make
    up most of it. In a model whose lists have no such members, those of its longest list.

    Args:
        model: a module, converted or not.
    """
    names = {module: name for name, module in named_modules(model)}
    has_norms = any(map(_is_norm, names))

    def is_layer(module: nn.Module) -> bool:
        if _matrices(module) < 2 or not _has_own_forward(module):
            return False
        return not has_norms or any(map(_is_norm, modules_of(module)))

    found = list(_layers_in(model, is_layer))
    if not found:
        lists = [
            [m for m in module._modules.values() if m is not None] for module in names if isinstance(module, _LISTS)
        ]
        members = max(lists, key=len, default=[])
        found = [m for m in members if _has_own_forward(m)]
    order = {module: place for place, module in enumerate(names)}
    return {names[module]: module for module in sorted(dict.fromkeys(found), key=order.__getitem__)}


def _layers_in(module: nn.Module, is_layer: Callable[[nn.Module], bool]) -> Iterator[nn.Module]:
    for child in module._modules.values():
        if child is None:
            continue
        if not (isinstance(module, _LISTS) and is_layer(child)):
            yield from _layers_in(child, is_layer)
            continue
        within = list(_layers_in(child, is_layer))
        if within and 2 * sum(map(_size, within)) >= _size(child):
            yield from within
        else:
            yield child


def _is_norm(module: nn.Module) -> bool:
    rule = rule_of(module)
    if rule is not None:
        return isinstance(rule, Norm)
    return isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm | nn.modules.batchnorm._NormBase)


def _has_own_forward(module: nn.Module) -> bool:
    return (
        type(module).forward is not nn.Module.forward
        and not isinstance(module, nn.ModuleList)
        and may_be_swapped(module)
    )


def _matrices(module: nn.Module) -> int:
    return sum(p.dim() > 1 for m in modules_of(module) for p in m._parameters.values() if p is not None)


def _size(module: nn.Module) -> int:
    return sum(p.numel() for m in modules_of(module) for p in m._parameters.values() if p is not None)


def above_lists(model: nn.Module) -> dict[nn.Module, None]:
    """The model, and what of it holds its outermost lists of layers."""
    above: dict[nn.Module, None] = {}

    def holds(module: nn.Module) -> bool:
        if module in seen:
            return module in above
        seen.add(module)
        children = [child for child in module._modules.values() if child is not None]
        lists = [isinstance(child, nn.ModuleList) or holds(child) for child in children]
        if any(lists):
            above[module] = None
        return any(lists)

    seen: set[nn.Module] = set()
    holds(model)
    return {model: None} | above


def has_forward(module: nn.Module) -> bool:
    """Whether it can be called: a list of modules cannot."""
    return type(module).forward not in (nn.Module.forward, nn.ModuleList.forward, nn.ModuleDict.forward)


def may_not_repeat(module: nn.Module) -> bool:
    """Whether it is set to write to what it was given, or to its own buffers, which must not happen twice."""
    return is_set(module, "inplace") or is_set(module, "track_running_stats")
