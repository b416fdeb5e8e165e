"""Runs of a function that may turn queries and keys, on small random tensors, and of what it is held against.

A run ends at the first operation that is not on the list of those allowed.
"""

import types
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...backends import reference
from ...backends.blocks import Rotary
from ..code.reachability import NotTriable
from ..rules.trial import Watching
from .forms import CallConvention, Form

# The operations that may run, all of which leave alone what they are given. (Autograd detaches what is written to; what
# a function detaches is seen by its gradient.)
_OPERATIONS = frozenset(
    """_to_copy _unsafe_view add alias cat clone detach empty_like expand mul neg permute repeat repeat_interleave rsub
    select slice split split_with_sizes squeeze stack sub transpose unbind unsqueeze view view_as_complex
    view_as_real""".split()
)
# Where those that take parts have the dimension.
_TAKES_PARTS = {"slice": 1, "split": 2, "split_with_sizes": 2}
_TAKES_ONE = {"select": 1, "unbind": 1}


class Arrangement(NamedTuple):
    """How many dimensions heads have, the sizes of a table's but for its last, where it gets another one, and how many
    queries and keys there are where that stands."""

    dims: int
    lead: tuple[int, ...]
    unsqueeze: int | None
    heads: tuple[int, int] = (3, 4)

    def larger(self) -> "Arrangement":
        """With sizes of which none is even, or less than five."""
        return self._replace(lead=(7, 9, 11)[: len(self.lead)], heads=(5, 13))

    def shapes(self, count: int, columns: int) -> list[tuple[int, ...]]:
        """Of queries and keys, which differ in what the table is the same for."""
        shapes = []
        for heads in self.heads[:count]:
            sizes = list(self.lead)
            if self.unsqueeze is not None:
                sizes.insert(self.unsqueeze, heads)
            shapes.append((*(15, heads + 4)[: self.dims - 1 - len(sizes)], *sizes, columns))
        return shapes


class Trial:
    """Runs a function on random tensors, with its operands given in one way and its other arguments as they are."""

    def __init__(
        self, function: types.FunctionType, convention: CallConvention, other_arguments: tuple[Any, ...]
    ) -> None:
        self.convention = convention
        self._function = function
        self._setting_values = other_arguments
        self._generator = torch.Generator("cpu").manual_seed(0)

    def random(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64, device="cpu")

    def operands(
        self, arrangement: Arrangement, columns: int, entries: int, ones: Sequence[bool] | None = None
    ) -> list[Tensor]:
        """Heads and tables, of which some dimensions have size 1."""
        lead = arrangement.lead
        if ones is not None:
            lead = tuple(1 if one else size for one, size in zip(ones, lead, strict=True))
        shapes = arrangement.shapes(self.convention.heads, columns)
        return [self.random(shape) for shape in (*shapes, *((*lead, entries),) * 2)]

    def run(self, operands: Sequence[Tensor], unit: int | None = None) -> list[Tensor] | None:
        """The results for heads and tables; None where it does not take them. See `_Strict` for the unit."""
        *heads, cos, sin = operands
        tables = self.convention.table_arguments(cos, sin)
        return None if tables is None else self.run_with_tables(heads, tables, unit)

    def run_with_tables(
        self, heads: Sequence[Tensor], tables: Sequence[Any], unit: int | None = None
    ) -> list[Tensor] | None:
        """The same for tables as the function is given them."""
        order = dict(zip(self.convention.places, (*heads, *tables), strict=True))
        given = [order[place] for place in range(len(order))] + [*self._setting_values]
        try:
            with _AllowedOperations(unit):
                results = self._function(*given)
        except NotTriable:
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

    def matching_forms(self, forms: Sequence[Form], operands: Sequence[Tensor], unit: int | None = None) -> list[Form]:
        """Those whose results are those of the function."""
        *heads, cos, sin = operands
        results = self.run(operands, unit)
        if results is None:
            return []
        found = []
        for form in forms:
            wanted = (reference_result(form, h, cos, sin) for h in heads)
            if all(w is not None and are_close(r, w) for r, w in zip(results, wanted, strict=True)):
                found.append(form)
        return found


class _AllowedOperations(Watching):
    """Ends the trial of what runs anything but these operations, or writes to anything but what it made empty; and,
    with a unit, of what takes parts of a dimension whose length is no multiple of that, or one after another of a
    dimension that it has not made itself, which has not more than four."""

    def __init__(self, unit: int | None) -> None:
        super().__init__()
        self._unit = unit
        self._made: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "copy_" and self._is_made(args[0]):
            return func(*args, **(kwargs or {}))
        if name not in _OPERATIONS or func._schema.is_mutable:
            raise NotTriable(f"computes with {name}")
        result = func(*args, **(kwargs or {}))
        if self._unit is not None and not _are_allowed_parts(name, args, result, self._unit):
            raise NotTriable("takes parts that a trial may not reach")
        if name == "empty_like":
            self._made.append(result)
        return result

    def _is_made(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()._cdata
        return any(made.untyped_storage()._cdata == storage for made in self._made)


def _are_allowed_parts(name: str, args: Sequence[Any], result: Any, unit: int) -> bool:
    place = _TAKES_PARTS.get(name, _TAKES_ONE.get(name))
    if place is None:
        return True
    dimension = args[place] if len(args) > place else 0
    whole = args[0].shape[dimension]
    if name in _TAKES_ONE:
        return whole <= 4
    parts = [result] if isinstance(result, Tensor) else result
    return all(part.shape[dimension] == whole or part.shape[dimension] % unit == 0 for part in parts)


def reference_result(form: Form, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor | None:
    """What heads become by a form; None where they do not fit."""
    options = form.options(heads.shape[-1], cos.shape[-1])
    if options is None:
        return None
    return reference.rotary(Rotary(heads, *form.tables(cos, sin), None, None, options))


def are_close(found: Tensor, reference_result: Tensor) -> bool:
    """To what float32 can tell, in which a function may compute whatever it is given."""
    return found.dtype == reference_result.dtype and torch.allclose(found, reference_result, rtol=1e-5, atol=1e-5)
