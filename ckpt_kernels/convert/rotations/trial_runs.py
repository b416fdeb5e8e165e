"""Trial runs of a function that may be a rotation, on small random tensors, compared with the reference op.

A run ends at the first operation that is not on the list of allowed ones.
"""

import types
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...backends import reference
from ...backends.blocks import Rotary
from ..code.snapshots import NotTriable
from ..rules.trial import TrialMode
from .forms import CallConvention, Form

# The allowed operations, none of which writes to an operand. (Autograd detaches tensors that are written to; `detach`
# in a function shows in the gradients.)
_OPERATIONS = frozenset(
    """_to_copy _unsafe_view add alias cat clone detach empty_like expand mul neg permute repeat repeat_interleave rsub
    select slice split split_with_sizes squeeze stack sub transpose unbind unsqueeze view view_as_complex
    view_as_real""".split()
)
# The index of the argument `dim`, in operations that take parts of a dimension, or one element after another.
_TAKES_PARTS = {"slice": 1, "split": 2, "split_with_sizes": 2}
_TAKES_ONE = {"select": 1, "unbind": 1}


class Arrangement(NamedTuple):
    """The dimensions of operands in a trial.

    `dims` is the number of dimensions of heads, `lead` the sizes of tables except the last, `unsqueeze` the place where
    tables get another dimension, and `heads` the sizes of queries and keys in that dimension.
    """

    dims: int
    lead: tuple[int, ...]
    unsqueeze: int | None
    heads: tuple[int, int] = (3, 4)

    def larger(self) -> "Arrangement":
        """The arrangement with larger sizes, all odd."""
        return self._replace(lead=(7, 9, 11)[: len(self.lead)], heads=(5, 13))

    def shapes(self, count: int, columns: int) -> list[tuple[int, ...]]:
        """The shapes of queries and keys, which differ in the dimensions that tables broadcast over."""
        shapes = []
        for heads in self.heads[:count]:
            sizes = list(self.lead)
            if self.unsqueeze is not None:
                sizes.insert(self.unsqueeze, heads)
            shapes.append((*(15, heads + 4)[: self.dims - 1 - len(sizes)], *sizes, columns))
        return shapes


class Trial:
    """Runs a function on random tensors by one call convention, with the same other arguments in all runs."""

    def __init__(
        self, function: types.FunctionType, convention: CallConvention, other_arguments: tuple[Any, ...]
    ) -> None:
        self.convention = convention
        self._function = function
        self._other_arguments = other_arguments
        self._generator = torch.Generator("cpu").manual_seed(0)

    def random(self, shape: Sequence[int]) -> Tensor:
        """A random float64 tensor."""
        return torch.randn(shape, generator=self._generator, dtype=torch.float64, device="cpu")

    def operands(
        self, arrangement: Arrangement, columns: int, entries: int, ones: Sequence[bool] | None = None
    ) -> list[Tensor]:
        """Random heads and tables. `ones` says which dimensions of tables except the last have size 1."""
        lead = arrangement.lead
        if ones is not None:
            lead = tuple(1 if one else size for one, size in zip(ones, lead, strict=True))
        shapes = arrangement.shapes(self.convention.heads, columns)
        return [self.random(shape) for shape in (*shapes, *((*lead, entries),) * 2)]

    def run(self, operands: Sequence[Tensor], unit: int | None = None) -> list[Tensor] | None:
        """The results for heads and tables, None if the function raises or returns anything else.

        For `unit` see `_AllowedOperations`. Raises `NotTriable`.
        """
        *heads, cos, sin = operands
        tables = self.convention.table_arguments(cos, sin)
        return None if tables is None else self.run_with_tables(heads, tables, unit)

    def run_with_tables(
        self, heads: Sequence[Tensor], tables: Sequence[Any], unit: int | None = None
    ) -> list[Tensor] | None:
        """The same for tables as the function takes them."""
        by_place = dict(zip(self.convention.places, (*heads, *tables), strict=True))
        arguments = [by_place[place] for place in range(len(by_place))] + [*self._other_arguments]
        try:
            with _AllowedOperations(unit):
                results = self._function(*arguments)
        except NotTriable:
            raise
        except Exception:  # a function may raise anything for shapes that it does not support
            return None
        results = [results] if len(heads) == 1 else results
        if type(results) not in (tuple, list) or len(results) != len(heads):
            return None
        if len(heads) > 1 and type(results) is list:  # the fused op returns a tuple
            return None
        fits = (type(r) is Tensor and r.shape == h.shape for r, h in zip(results, heads, strict=True))
        return list(results) if all(fits) else None

    def matching_forms(self, forms: Sequence[Form], operands: Sequence[Tensor], unit: int | None = None) -> list[Form]:
        """The forms whose reference results are those of the function."""
        *heads, cos, sin = operands
        results = self.run(operands, unit)
        if results is None:
            return []
        matching = []
        for form in forms:
            expected = (reference_result(form, h, cos, sin) for h in heads)
            if all(e is not None and are_close(r, e) for r, e in zip(results, expected, strict=True)):
                matching.append(form)
        return matching


class _AllowedOperations(TrialMode):
    """Ends a trial at any operation but the allowed ones, and at a write to any tensor but the function's `empty_like`.

    With a `unit` the trial also ends at a part of a dimension whose length is no multiple of the unit, and at `select`
    or `unbind` along a dimension of more than four elements, which the function has not made by itself.
    """

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
    """Whether the parts that an operation takes fit the unit: see `_AllowedOperations`."""
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
    """The heads rotated by a form, None if their shape does not fit."""
    options = form.options(heads.shape[-1], cos.shape[-1])
    if options is None:
        return None
    return reference.rotary(Rotary(heads, *form.tables(cos, sin), None, None, options))


def are_close(result: Tensor, expected: Tensor) -> bool:
    """Whether results agree up to float32 rounding: a function may compute in float32 for any dtype."""
    return result.dtype == expected.dtype and torch.allclose(result, expected, rtol=1e-5, atol=1e-5)
