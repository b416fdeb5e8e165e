"""Walks the modules below a module, and the tensors that these modules hold, without calling any of their code.

A user's class may define `parameters`, `modules` or `named_modules`, as methods or as anything else. The functions
here read torch's own dicts (`_modules`, `_parameters`, `_buffers`) and never take the truth value of a user's object.
"""

import fnmatch
from collections.abc import Container, Iterable, Iterator

from torch import Tensor, nn
from torch.nn.parameter import is_lazy


def named_modules(model: nn.Module, duplicates: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """The module and all modules below, with their names, each module once.

    With `duplicates`, a module that occurs several times comes under each of the names, but not below itself.
    """
    return _walk(model, "", set(), duplicates)


# No inner function: one that calls itself is a reference cycle, which would hold the modules in `seen`.
def _walk(module: nn.Module, name: str, seen: set[nn.Module], duplicates: bool) -> Iterator[tuple[str, nn.Module]]:
    if module in seen:
        return
    seen.add(module)
    yield name, module
    for key, child in module._modules.items():
        if child is not None:
            yield from _walk(child, f"{name}.{key}" if name else key, seen, duplicates)
    if duplicates:
        seen.remove(module)


def names_fitting(names: Iterable[str], pattern: str) -> list[str]:
    """The names of modules that a pattern with the wildcards * and ? fits. Brackets stand for themselves."""
    return fnmatch.filter(names, pattern.replace("[", "[[]"))


def nearest(name: str, names: Container[str]) -> str:
    """The name itself, or that of the nearest module around it, that is among the names; "" without one."""
    while name and name not in names:
        name = name.rpartition(".")[0]
    return name


def modules_of(model: nn.Module) -> Iterator[nn.Module]:
    """The module and all modules below, each once."""
    return (module for _, module in named_modules(model))


def initialized_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of the module and of all modules below, without lazy ones, which have no shape yet."""
    return (parameter for module in modules_of(model) for parameter in own_parameters(module))


def own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of the module itself, without lazy ones."""
    return [p for p in module._parameters.values() if p is not None and not is_lazy(p)]


def check_initialized(model: nn.Module) -> None:
    """Raises ValueError if a parameter or buffer is lazy: a model with such tensors cannot be copied."""
    for name, module in named_modules(model):
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and is_lazy(tensor):
                place = f"{name}.{key}" if name else key
                raise ValueError(f"{place} is a lazy parameter; expected the model to be called once before")


def children_of(module: nn.Module) -> list[nn.Module]:
    """The modules directly below the module."""
    return [child for child in module._modules.values() if child is not None]


def is_parametrized(module: nn.Module) -> bool:
    """Whether a parameter of the module is parametrized. Runs no code of the module, unlike torch's function."""
    modules = module.__dict__.get("_modules")
    return type(modules) is dict and isinstance(modules.get("parametrizations"), nn.ModuleDict)


def tensors_of(model: nn.Module, buffers: bool = False) -> Iterator[Tensor]:
    """The parameters of the module and of all modules below, and with `buffers` the buffers too."""
    for module in modules_of(model):
        for tensors in (module._parameters, module._buffers) if buffers else (module._parameters,):
            yield from (tensor for tensor in tensors.values() if tensor is not None)
