"""Rotations: functions such as `apply_rotary_pos_emb(q, k, cos, sin)`, with the fused op that replaces their calls.

Only trials on small random tensors show in which order a function takes heads (queries and keys) and tables (cosines
and sines), which elements form pairs, how tables broadcast to heads, and whether tables are two tensors or a complex
one. The function must depend on nothing but its arguments, and branch only on settings (see
`code.function_reachability`). A call then becomes one of the fused op where the operands are of a kind that was tried,
and stays as written elsewhere.
"""

import inspect
import types
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import recompute
from ...backends.blocks import RotaryOptions
from ...ops.rotary import rotary
from ..code.snapshots import CodeSnapshot, NotTriable
from ..operands import is_operand


class Form(NamedTuple):
    """How a rotation reads tables and pairs elements.

    A table gets a dimension at `unsqueeze`, unless that is None. `table` says which entries are read: one for each
    rotated column ("full"), one for each pair ("half"), the first of two halves ("first half"), or, of each two
    neighbours, the first of the cosines and the second of the sines ("neighbours"). `layout` and `output_layout` are
    "halves" or "interleaved". `at_end`: the rotated columns are the last ones, not the first. `is_inverse`: the
    rotation is by the negative angle.
    """

    unsqueeze: int | None
    table: str
    layout: str
    output_layout: str
    at_end: bool
    is_inverse: bool

    def options(self, columns: int, entries: int) -> RotaryOptions | None:
        """The options of the fused op for heads with so many columns; None if the heads have too few."""
        rotary_dim = 2 * entries if self.table == "half" else entries
        if rotary_dim % 2 or rotary_dim > columns:
            return None
        start = columns - rotary_dim if self.at_end else 0
        return RotaryOptions(rotary_dim, start, self.layout == "interleaved", self.output_layout == "interleaved")

    def tables(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """The tables that broadcast to heads, as the fused op reads them."""
        return self._entries(cos, 0), self._entries(-sin if self.is_inverse else sin, 1)

    def lead(self, shape: Sequence[int]) -> list[int]:
        """All sizes but the last of a table of this shape, after the unsqueeze."""
        lead = list(shape[:-1])
        if self.unsqueeze is not None:
            lead.insert(self.unsqueeze, 1)
        return lead

    def _entries(self, table: Tensor, neighbour: int) -> Tensor:
        if self.table == "first half":
            table = table[..., : table.shape[-1] // 2]
        if self.table == "neighbours":
            table = table[..., neighbour::2]
        return table if self.unsqueeze is None else table.unsqueeze(self.unsqueeze)


# The arguments other than operands, with their types, which tell True from 1.
Settings = tuple[tuple[type, Any], ...]


class OperandKind(NamedTuple):
    """A kind of operands that trials cover: the settings, the number of dimensions of heads, for each dimension of
    tables but the last whether the size is 1, and whether tables have as many columns as heads."""

    settings: Settings
    dims: int
    ones: tuple[bool, ...]
    is_whole: bool


class KnownForm(NamedTuple):
    """A form that trials have shown for a kind of operands.

    `is_partial`: whether heads may have columns that are not rotated. `keeps_strides`: whether results have the strides
    of heads, rather than being contiguous; `takes_any_tables`: whether that holds for tables with any strides, rather
    than for contiguous ones only.
    """

    form: Form
    is_partial: bool
    keeps_strides: bool = False
    takes_any_tables: bool = False


class CallConvention(NamedTuple):
    """How a function takes its operands: one or two tensors of `heads`, and the tables.

    `places` are the positions of the heads and then of the tables among the arguments. The tables are "apart", a pair
    ("cos, sin" or "sin, cos") in one argument, or one "complex" tensor.
    """

    heads: int
    places: tuple[int, ...]
    tables: str = "apart"

    def table_arguments(self, cos: Tensor, sin: Tensor) -> tuple[Any, ...] | None:
        """The arguments for tables; None if the dtype has no complex counterpart."""
        if self.tables == "complex":
            if cos.dtype not in (torch.float32, torch.float64):
                return None
            # torch.complex would allocate memory for expanded dimensions.
            unexpanded = tuple([slice(1) if stride == 0 else slice(None) for stride in cos.stride()])
            return (torch.complex(cos[unexpanded], sin[unexpanded]).expand(cos.shape),)
        if self.tables == "apart":
            return cos, sin
        return ((cos, sin) if self.tables == "cos, sin" else (sin, cos),)

    def tables_in(self, arguments: Sequence[Any]) -> Sequence[Any] | None:
        """The cosines and sines, unchecked, in the arguments for tables; None if these are of another kind."""
        if self.tables == "apart":
            return arguments
        (argument,) = arguments
        if self.tables == "complex":
            if type(argument) is not Tensor or argument.layout is not torch.strided or not argument.is_complex():
                return None
            return None if argument.is_conj() or argument.is_neg() else torch.view_as_real(argument).unbind(-1)
        if type(argument) not in (tuple, list) or len(argument) != 2:
            return None
        return argument if self.tables == "cos, sin" else argument[::-1]

    def are_contiguous(self, arguments: Sequence[Any]) -> bool:
        """Whether the tables in the arguments, which `tables_in` has found, are contiguous."""
        tables = arguments if self.tables in ("apart", "complex") else arguments[0]
        return all(table.is_contiguous() for table in tables)


class DtypesCase(NamedTuple):
    """What a function does for heads and tables of two dtypes.

    `saves_tables`: whether autograd saves the cosines and sines themselves, not copies. `widens`: whether results have
    the dtype of tables, as the products of 16-bit heads and float32 tables do, instead of that of heads.
    """

    saves_tables: tuple[bool, bool]
    widens: bool


# The supported dtypes of heads and tables.
SupportedDtypes = dict[tuple[torch.dtype, torch.dtype], DtypesCase]


def is_setting(value: Any) -> bool:
    """Whether an argument is a setting: a boolean, an integer or None."""
    return type(value) in (bool, int, type(None))


def settings_of(values: Sequence[Any]) -> Settings:
    """The settings with their types."""
    return tuple((type(value), value) for value in values)


class Rotation:
    """The outcome of trials: the forms by the kind of operands, and the call convention and dtypes by the settings."""

    def __init__(self, function: types.FunctionType, code: CodeSnapshot) -> None:
        self.code = code
        self.forms: dict[OperandKind, KnownForm] = {}
        self.conventions: dict[Settings, tuple[CallConvention, SupportedDtypes]] = {}
        self.names, self.defaults = parameters_of(function)

    def of(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The results for the arguments of a call, None if the function itself has to compute them."""
        arguments = self._bound(args, kwargs)
        if arguments is None or not self.code.is_same():
            return None
        other_arguments = arguments[len(self.names) - len(self.defaults) :]
        if not all(map(is_setting, other_arguments)):
            return None
        settings = settings_of(other_arguments)
        if settings not in self.conventions:
            return None
        convention, dtypes = self.conventions[settings]
        operands = [arguments[place] for place in convention.places]
        heads, table_arguments = operands[: convention.heads], operands[convention.heads :]
        tables = convention.tables_in(table_arguments)
        if tables is None or not all(map(is_operand, (*heads, *tables))):
            return None
        first, (cos, sin) = heads[0], tables
        fits = cos.shape == sin.shape and cos.dtype == sin.dtype and cos.dim() > 0 and first.dim() > 0
        fits = fits and (first.dtype, cos.dtype) in dtypes and all(h.dtype == first.dtype for h in heads)
        fits = fits and all(t.device == first.device for t in (*heads, cos, sin))
        if not fits or (torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)):
            return None
        are_contiguous = convention.are_contiguous(table_arguments)
        calls = [call for h in heads if (call := self._call(h, cos.shape, settings, are_contiguous)) is not None]
        if len(calls) != len(heads) or len({form for form, _ in calls}) > 1:
            return None
        read_tables = list(calls[0][0].tables(cos, sin))
        case = dtypes[first.dtype, cos.dtype]
        if torch.is_grad_enabled() and any(h.requires_grad for h in heads):
            # The user may write in place to tables of which the original function saves copies.
            pairs = zip(read_tables, case.saves_tables, strict=True)
            read_tables = [t if is_saved else t.clone() for t, is_saved in pairs]
        if case.widens:
            heads = [_widened(h, cos.dtype) for h in heads]
        rotated = [rotary(h, *read_tables, None, None, options) for (_, options), h in zip(calls, heads, strict=True)]
        return rotated[0] if len(rotated) == 1 else tuple(rotated)

    def _bound(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any] | None:
        """The arguments in the order of the parameters, None if they do not fit."""
        if len(args) > len(self.names) or not all(name in self.names[len(args) :] for name in kwargs):
            return None
        arguments = list(args)
        for name in self.names[len(args) :]:
            if name not in kwargs and name not in self.defaults:
                return None
            arguments.append(kwargs[name] if name in kwargs else self.defaults[name])
        return arguments

    def _call(
        self, heads: Tensor, table: Sequence[int], settings: Settings, are_contiguous: bool
    ) -> tuple[Form, RotaryOptions] | None:
        """The form and options of the fused op for heads and tables of these shapes, None if no trial covers them."""
        columns, entries = heads.shape[-1], table[-1]
        ones = tuple([size == 1 for size in table[:-1]])
        known = self.forms.get(OperandKind(settings, heads.dim(), ones, entries == columns))
        options = None if known is None else known.form.options(columns, entries)
        if known is None or options is None or (options.rotary_dim < columns and not known.is_partial):
            return None
        # torch.cat may take parts of one column for a channels-last tensor, and return such strides.
        if options.rotary_dim < 4:
            return None
        lead, whole = known.form.lead(table), heads.shape[:-1]
        # The strides of results are not known for expanded heads and for those with a strided last dimension.
        strides = heads.stride()
        if len(lead) > len(whole) or not heads.numel() or strides[-1] != 1 or 0 in strides:
            return None
        if not (known.takes_any_tables or are_contiguous):
            return None
        if any(size not in (1, other) for size, other in zip(reversed(lead), reversed(whole), strict=False)):
            return None
        return known.form, options._replace(contiguous=not known.keeps_strides)


def _widened(heads: Tensor, dtype: torch.dtype) -> Tensor:
    """The heads in a wider dtype, which nobody else writes to."""
    wide = heads.to(dtype)
    recompute.note(wide, heads)
    return wide


def parameters_of(function: types.FunctionType) -> tuple[list[str], dict[str, Any]]:
    """The names of the parameters, and their defaults. Raises `NotTriable` for other than plain parameters."""
    parameters = inspect.signature(function, follow_wrapped=False).parameters.values()
    if any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters):
        raise NotTriable("takes arguments in a way of its own")
    return [p.name for p in parameters], {p.name: p.default for p in parameters if p.default is not p.empty}
