"""Which biases nobody has written to since a module's forward began: recipes may read copies of these."""

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from . import fast_path


class Biases:
    """The versions and the memory of a module's biases when the forward began; without a module all parameters count as
    unchanged. A bias that is given other data (`bias.data = other`) has the version that it had."""

    def __init__(self, module: nn.Module | None) -> None:
        found = None if module is None else fast_path.biases(module)
        self._versions = versions_in(module) if found is None and module is not None else found

    def is_as_used(self, bias: nn.Parameter) -> bool:
        """Whether nobody has written to a bias since the forward began, so since any of the forward's ops read it."""
        if self._versions is None:
            return True
        known, version, address = self._versions.get(id(bias), (None, 0, 0))
        return known is bias and bias._version == version and address_of(bias) == address


def address_of(parameter: nn.Parameter) -> int:
    """That of the memory; 0 for a kind of tensor that is not asked."""
    return parameter.data_ptr() if type(parameter) is nn.Parameter and parameter.layout is torch.strided else 0


def versions_in(module: nn.Module) -> dict[int, tuple[nn.Parameter, int, int]]:
    """The parameters of at most one dimension in a module and below, their versions and addresses, by identity."""
    found = (p for p in parameters_in(module) if p.dim() < 2 and not p.is_inference())
    return {id(p): (p, p._version, address_of(p)) for p in found}


def parameters_in(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters in a module and below, but for those that have no shape yet."""
    waiting, seen = [module], set()
    for module in waiting:
        own = module.__dict__
        for parameter in own["_parameters"].values():
            if parameter is not None and (type(parameter) is nn.Parameter or not is_lazy(parameter)):
                yield parameter
        children = own["_modules"]
        if children and module not in seen:
            seen.add(module)
            waiting += [child for child in children.values() if child is not None]
