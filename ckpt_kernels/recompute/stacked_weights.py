"""Weights of several experts in one parameter, of which an op gathers some for each token: a recipe gathers them again.

Torch keeps the gathered copies, and of the parameter not even the version. So a recipe may read the parameter only if
nobody has written to it since the forward began in which it was gathered. A write after that is an error in the
backward pass, as it is for the weight of a linear layer.
"""

import weakref

from torch import nn

from .biases import address_of, parameters_in

# The dimensions of the matrices of experts in one parameter; a linear layer's matrix has two.
_STACKED = 3
# The weights that were found in a module, once: of what came later nothing is known, and its copies are kept.
_found: "weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[nn.Parameter]]]" = weakref.WeakKeyDictionary()


class Stacked:
    """The versions and the memory of a module's weights of three dimensions when its forward began."""

    def __init__(self, module: nn.Module | None) -> None:
        self._module = None if module is None else weakref.ref(module)
        found = () if module is None else _weights_in(module)
        weights = [weight for reference in found if (weight := reference()) is not None]
        self._versions = {id(w): (w, w._version, address_of(w)) for w in weights if not w.is_inference()}

    def is_as_used(self, weight: nn.Parameter) -> bool:
        """Whether nobody has written to a weight since the forward began, so since any of the forward's ops read it."""
        known, version, address = self._versions.get(id(weight), (None, 0, 0))
        if (
            known is None
            and weight.dim() == _STACKED
            and self._module is not None
            and (module := self._module()) is not None
        ):
            # It may have come later: the next forward looks again.
            _found.pop(module, None)
        return known is weight and weight._version == version and address_of(weight) == address


def _weights_in(module: nn.Module) -> "list[weakref.ref[nn.Parameter]]":
    found = _found.get(module)
    if found is None:
        weights = (
            weight for weight in parameters_in(module) if type(weight) is nn.Parameter and weight.dim() == _STACKED
        )
        found = _found[module] = list(map(weakref.ref, weights))
    return found
