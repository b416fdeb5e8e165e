"""Weights of several experts stacked in one parameter, of which an op gathers some for each token.

torch keeps the gathered copies. A recipe gathers them again. torch does not even keep the version of the parameter, so
a recipe may read the parameter only if there was no in-place write between the start of the forward pass and the
gather. A later write is an error in the backward pass, as for the weight of a linear layer.
"""

import weakref
from typing import Any

from torch import nn

from .biases import is_as_recorded, parameters_in, versions_of
from .nodes import LEAF, name_of
from .rules import VIEWS

# The dimensions of a parameter with stacked matrices; the matrix of a linear layer has two.
_STACKED = 3
# The stacked weights of a module, searched for once. Weights that the module gets later are not known, and their
# gathered copies are kept.
_weights_by_module: "weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[nn.Parameter]]]" = (
    weakref.WeakKeyDictionary()
)

_without_weights: "weakref.WeakKeyDictionary[nn.Module, StackedWeights]" = weakref.WeakKeyDictionary()


def stacked_weights_of(module: nn.Module) -> "StackedWeights":
    """The stacked weights of a module. Those of a module without any are made once."""
    weights = _without_weights.get(module)
    if weights is None:
        weights = StackedWeights(module)
        if weights.is_empty:
            _without_weights[module] = weights
    return weights


class StackedWeights:
    """The versions and addresses of a module's three-dimensional weights at the start of the forward pass."""

    def __init__(self, module: nn.Module | None) -> None:
        self._module = None if module is None else weakref.ref(module)
        references = () if module is None else _weights_in(module)
        self._versions = versions_of(weight for reference in references if (weight := reference()) is not None)

    @property
    def is_empty(self) -> bool:
        """Whether the module has no such weight."""
        return not self._versions

    def is_unchanged(self, weight: nn.Parameter) -> bool:
        """Whether a weight is unchanged since the forward pass began, when no op had read the weight."""
        module = None if self._module is None else self._module()
        if module is not None and id(weight) not in self._versions and _is_stacked(weight):
            # The module may have got the weight later: the next forward pass searches again.
            _weights_by_module.pop(module, None)
            _without_weights.pop(module, None)
        return is_as_recorded(weight, self._versions)


def reads_stacked_weight(node: Any) -> bool:
    """Whether the second operand of a product is a stacked weight or a part of one, perhaps cast by autocast."""
    maker = node.next_functions[1][0]
    while maker is not None and (name_of(maker) in VIEWS or name_of(maker) == "ToCopyBackward0"):
        maker = maker.next_functions[0][0]
    return maker is not None and name_of(maker) == LEAF and _is_stacked(maker.variable)


def _is_stacked(weight: nn.Parameter) -> bool:
    """Whether a parameter may stack the matrices of several experts."""
    return weight.dim() == _STACKED


def _weights_in(module: nn.Module) -> "list[weakref.ref[nn.Parameter]]":
    """The stacked weights of a module and its submodules."""
    references = _weights_by_module.get(module)
    if references is None:
        weights = (weight for weight in parameters_in(module) if type(weight) is nn.Parameter and _is_stacked(weight))
        references = _weights_by_module[module] = list(map(weakref.ref, weights))
    return references
