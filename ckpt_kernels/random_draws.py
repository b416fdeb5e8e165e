"""Random draws of one run, used again in another run that computes in another dtype.

A generator gives other numbers for another dtype, so equal seeds are not enough.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .nested_values import tensors_in


class _Draws(TorchDispatchMode):
    """Calls a function with the tensors that each op returns that draws random numbers."""

    def __init__(self, drawn: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._drawn = drawn

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags:
            for tensor in tensors_in(result):
                self._drawn(tensor)
        return result


def recorded(draws: list[Tensor]) -> TorchDispatchMode:
    """A context that appends copies of all random tensors to `draws`."""
    return _Draws(lambda tensor: draws.append(tensor.clone()))


def repeated(draws: Sequence[Tensor]) -> TorchDispatchMode:
    """A context in which random tensors get the values of `draws`, one after the other.

    From the first tensor on that has another shape than at first, random tensors keep their own values.
    """
    remaining = list(reversed(draws))

    def fill(tensor: Tensor) -> None:
        if remaining and remaining[-1].shape == tensor.shape:
            tensor.copy_(remaining.pop())
        else:
            remaining.clear()

    return _Draws(fill)
