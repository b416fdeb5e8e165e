"""Which biases nobody has written to since a module's forward began: recipes may read copies of these."""

from collections.abc import Iterator

from torch import nn
from torch.nn.parameter import is_lazy


class Biases:
    """The versions of biases when a module's forward began. Before that all parameters count as unchanged."""

    def __init__(self) -> None:
        # By identity; None before the first call.
        self._versions: dict[int, tuple[nn.Parameter, int]] | None = None

    def begin(self, module: nn.Module) -> None:
        """The module's forward begins. From the first such call on, only biases that were there then are copied."""
        versions = {} if self._versions is None else self._versions
        versions.update((id(bias), (bias, bias._version)) for bias in _biases_in(module) if id(bias) not in versions)
        self._versions = versions

    def is_as_used(self, bias: nn.Parameter) -> bool:
        """Whether nobody has written to a bias since the forward began, so since any of the forward's ops read it."""
        if self._versions is None:
            return True
        known, version = self._versions.get(id(bias), (None, 0))
        return known is bias and bias._version == version

    def clear(self) -> None:
        """No bias is known any more."""
        self._versions = {}


def _biases_in(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of at most one dimension in a module and below; some of them more than once."""
    waiting, seen = [module], set()
    for module in waiting:
        own = module.__dict__
        for parameter in own["_parameters"].values():
            if parameter is None or is_lazy(parameter):
                continue
            if parameter.dim() < 2 and not parameter.is_inference():
                yield parameter
        if own["_modules"] and module not in seen:
            seen.add(module)
            waiting += [child for child in own["_modules"].values() if child is not None]
