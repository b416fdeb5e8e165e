"""Tracks the biases of a module, so that recipes copy only biases that are unchanged since the forward pass began."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from . import fast_path, nodes

# Parameters with their versions and addresses, by identity.
Versions = dict[int, tuple[nn.Parameter, int, int]]


class Biases:
    """The versions and addresses of a module's biases at the start of the forward pass.

    Without a module every parameter counts as unchanged. The address is needed because `bias.data = other` does not
    change the version counter.
    """

    def __init__(self, module: nn.Module | None) -> None:
        versions = None if module is None else fast_path.biases(module)
        self._versions = versions_in(module) if versions is None and module is not None else versions

    def copied(self, leaf: Tensor) -> Tensor | None:
        """A copy of a bias that is unchanged; None for other tensors.

        Optimizer steps and sharding do not change the copy.
        """
        is_bias = isinstance(leaf, nn.Parameter) and leaf.dim() < 2 and type(leaf.data) is Tensor
        return leaf.detach().clone() if is_bias and self.is_unchanged(leaf) else None

    def cast(self, node: Any, first_node: int) -> Tensor | None:
        """A copy of a bias that autocast cast, by the cast's node. `first_node` is the context's first node, by number.

        The node keeps the copy, because autocast casts a bias once for several forward passes.
        """
        copy = nodes.noted_copy(node)
        if copy is None and nodes.is_made_since(node, first_node):
            copy = self.copied(node.next_functions[0][0].variable)
            copy = None if copy is None else nodes.note_copy(node, copy)
        return copy

    def is_unchanged(self, bias: Tensor) -> bool:
        """Whether a bias is unchanged since the forward pass began, when no op had read the bias."""
        return self._versions is None or is_as_recorded(bias, self._versions)


def versions_in(module: nn.Module) -> Versions:
    """The versions and addresses of a module's parameters with at most one dimension."""
    return versions_of(p for p in parameters_in(module) if p.dim() < 2)


def versions_of(parameters: Iterable[nn.Parameter]) -> Versions:
    """The present versions and addresses of parameters, without those that have no version."""
    return {id(p): (p, p._version, address_of(p)) for p in parameters if not p.is_inference()}


def is_as_recorded(parameter: Tensor, versions: Versions) -> bool:
    """Whether a parameter was recorded, and has the same version and address now."""
    recorded, version, address = versions.get(id(parameter), (None, 0, 0))
    return recorded is parameter and parameter._version == version and address_of(parameter) == address


def address_of(parameter: Tensor) -> int:
    """The address of a parameter's memory; 0 for a subclass or a sparse layout."""
    return parameter.data_ptr() if type(parameter) is nn.Parameter and parameter.layout is torch.strided else 0


def parameters_in(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a module and of its submodules, without uninitialized lazy ones, and without those of
    scripted modules, whose biases are not read by recipes."""
    queue, seen = [module], set()
    for module in queue:
        own = module.__dict__
        for parameter in own.get("_parameters", {}).values():
            if parameter is not None and (type(parameter) is nn.Parameter or not is_lazy(parameter)):
                yield parameter
        children = own.get("_modules")
        if children and module not in seen:
            seen.add(module)
            queue += [child for child in children.values() if child is not None]
