"""One trial of a function that may turn queries and keys: what it makes of tensors, and where a trial ends."""

import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .reached import NotTried
from .rotations import Way

# The operations that may run, all of which leave alone what they are given. (Autograd detaches what is written to; what
# a function detaches is seen by its gradient.)
_OPERATIONS = frozenset(
    """_to_copy _unsafe_view add alias cat clone detach empty_like expand mul neg permute repeat repeat_interleave rsub
    select slice split split_with_sizes squeeze stack sub transpose unbind unsqueeze view view_as_complex
    view_as_real""".split()
)


class _Strict(TorchDispatchMode):
    """Ends the trial of what runs anything but these operations. It may write to what it made empty, and to nothing
    else."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "copy_" and self._is_made(args[0]):
            return func(*args, **(kwargs or {}))
        if name not in _OPERATIONS or func._schema.is_mutable:
            raise NotTried(f"computes with {name}")
        output = func(*args, **(kwargs or {}))
        if name == "empty_like":
            self._made.append(output)
        return output

    def _is_made(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()._cdata
        return any(made.untyped_storage()._cdata == storage for made in self._made)


class Trial:
    """Runs a function on random tensors, with its operands given in one way and its settings."""

    def __init__(self, function: types.FunctionType, way: Way, others: tuple[Any, ...]) -> None:
        self._function = function
        self._way = way
        self._others = others
        self._generator = torch.Generator("cpu").manual_seed(0)

    def random(self, shape: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64, device="cpu").to(dtype)

    def run(self, operands: Sequence[Tensor]) -> list[Tensor] | None:
        """The results for heads and tables; None where it does not take them."""
        *heads, cos, sin = operands
        tables = self._way.arguments_of(cos, sin)
        if tables is None:
            return None
        order = dict(zip(self._way.places, (*heads, *tables), strict=True))
        given = [order[place] for place in range(len(order))] + [*self._others]
        try:
            with _Strict():
                results = self._function(*given)
        except NotTried:
            raise
        except Exception:  # whatever it may raise of shapes that it does not take
            return None
        results = [results] if len(heads) == 1 else results
        if (
            type(results) not in (tuple, list)
            or len(results) != len(heads)
            or (len(heads) > 1 and type(results) is list)
        ):
            return None
        fits = (type(r) is Tensor and r.shape == h.shape for r, h in zip(results, heads, strict=True))
        return list(results) if all(fits) else None
