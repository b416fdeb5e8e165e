"""Functions that turn queries and keys by the angles of tables: `apply_rotary_pos_emb(q, k, cos, sin)` and its kin.

Such a function is known by trying it out on small random tensors, and by nothing else: in which order it takes its
operands, which elements are pairs, how tables stand beside heads, and whether they are given as a pair or as one of
complex numbers. It must be a function of its arguments alone, without a decision in it but by its settings (see
`code.reached_functions`). A call of it then is one of ours, where its operands are of the kinds that were tried; else
it is what was written.
"""

import inspect
import types
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...backends.blocks import RotaryOptions
from ...ops.rotary import rotary
from ..code.reachability import CodeSnapshot, NotTriable
from ..operands import is_operand


class Form(NamedTuple):
    """How heads turn. A table gets a dimension at `unsqueeze`; then it has an entry for each column that turns
    ("full"), for each pair ("half"), or twice as many as are read: those of its "first half", or of "neighbours" the
    first of the cosines and the second of the sines. What does not turn comes first where
    the rest is `at_end`; heads turn `back` where the sine's sign is the other one."""

    unsqueeze: int | None
    table: str
    layout: str
    output_layout: str
    at_end: bool
    back: bool

    def options(self, columns: int, entries: int) -> RotaryOptions | None:
        """Of heads of that many columns; None where they have not enough."""
        turned = 2 * entries if self.table == "half" else entries
        if turned % 2 or turned > columns:
            return None
        start = columns - turned if self.at_end else 0
        return RotaryOptions(turned, start, self.layout == "interleaved", self.output_layout == "interleaved")

    def tables(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Both as they stand beside heads."""
        return self._entries(cos, 0), self._entries(-sin if self.back else sin, 1)

    def lead(self, shape: Sequence[int]) -> list[int]:
        """The sizes, but for the last, of a table of that shape as it stands beside heads."""
        lead = list(shape[:-1])
        if self.unsqueeze is not None:
            lead.insert(self.unsqueeze, 1)
        return lead

    def _entries(self, table: Tensor, of_neighbours: int) -> Tensor:
        if self.table == "first half":
            table = table[..., : table.shape[-1] // 2]
        if self.table == "neighbours":
            table = table[..., of_neighbours::2]
        return table if self.unsqueeze is None else table.unsqueeze(self.unsqueeze)


# The arguments that are no operands, with their types: True is no 1.
Settings = tuple[tuple[type, Any], ...]


class Kind(NamedTuple):
    """What a form is known for: the settings, the dimensions of heads, whether each of those of tables before their
    last has size 1, and whether tables have as many columns as heads."""

    settings: Settings
    dims: int
    ones: tuple[bool, ...]
    is_whole: bool


class Found(NamedTuple):
    """A form, whether heads may be longer than what turns, whether results lie as heads do, else contiguous, and
    whether that is so whatever way tables lie in, else only beside contiguous ones."""

    form: Form
    is_partial: bool
    keeps_strides: bool = False
    takes_any_tables: bool = False


class Call(NamedTuple):
    """What is to be computed of heads."""

    form: Form
    options: RotaryOptions


class Way(NamedTuple):
    """How a function is given its operands: the places of one or two heads and then of the tables, which are "apart", a
    pair of "cos, sin" or "sin, cos" in one place, or one table that is "complex"."""

    heads: int
    places: tuple[int, ...]
    tables: str = "apart"

    def arguments_of(self, cos: Tensor, sin: Tensor) -> tuple[Any, ...] | None:
        """What is given for tables; None where there is nothing of the kind of that dtype."""
        if self.tables == "complex":
            if cos.dtype not in (torch.float32, torch.float64):
                return None
            # torch.complex makes memory for what is expanded.
            least = tuple([slice(1) if stride == 0 else slice(None) for stride in cos.stride()])
            return (torch.complex(cos[least], sin[least]).expand(cos.shape),)
        if self.tables == "apart":
            return cos, sin
        return ((cos, sin) if self.tables == "cos, sin" else (sin, cos),)

    def tables_in(self, arguments: Sequence[Any]) -> Sequence[Any] | None:
        """cos and sin, which are looked at no further, of what is given for tables."""
        if self.tables == "apart":
            return arguments
        (given,) = arguments
        if self.tables == "complex":
            if type(given) is not Tensor or given.layout is not torch.strided or not given.is_complex():
                return None
            return None if given.is_conj() or given.is_neg() else torch.view_as_real(given).unbind(-1)
        if type(given) not in (tuple, list) or len(given) != 2:
            return None
        return given if self.tables == "cos, sin" else given[::-1]

    def are_contiguous(self, arguments: Sequence[Any]) -> bool:
        """Of what is given for tables and has some in it."""
        given = arguments if self.tables in ("apart", "complex") else arguments[0]
        return all(table.is_contiguous() for table in given)


# For dtypes of heads and tables whether autograd keeps the cosine and the sine themselves, else copies of them.
Dtypes = dict[tuple[torch.dtype, torch.dtype], tuple[bool, bool]]


def is_setting(value: Any) -> bool:
    return type(value) in (bool, int, type(None))


def settings_of(values: Sequence[Any]) -> Settings:
    return tuple((type(value), value) for value in values)


class Rotation:
    """A function that turns heads: its forms, and for each of its settings how operands are given, and which dtypes of
    heads and tables are taken."""

    def __init__(self, function: types.FunctionType, code: CodeSnapshot) -> None:
        self.code = code
        self.forms: dict[Kind, Found] = {}
        self.ways: dict[Settings, tuple[Way, Dtypes]] = {}
        self.names, self.defaults = parameters_of(function)

    def of(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The results, or None where the function itself has to compute them."""
        given = self._bound(args, kwargs)
        if given is None or not self.code.is_same():
            return None
        others = given[len(self.names) - len(self.defaults) :]
        if not all(map(is_setting, others)):
            return None
        settings = settings_of(others)
        if settings not in self.ways:
            return None
        way, dtypes = self.ways[settings]
        operands = [given[place] for place in way.places]
        heads, held = operands[: way.heads], operands[way.heads :]
        tables = way.tables_in(held)
        if tables is None or not all(map(is_operand, (*heads, *tables))):
            return None
        first, (cos, sin) = heads[0], tables
        fits = cos.shape == sin.shape and cos.dtype == sin.dtype and cos.dim() > 0 and first.dim() > 0
        fits = fits and (first.dtype, cos.dtype) in dtypes and all(h.dtype == first.dtype for h in heads)
        fits = fits and all(t.device == first.device for t in (*heads, cos, sin))
        if not fits or (torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)):
            return None
        plain = way.are_contiguous(held)
        calls = [call for h in heads if (call := self._call(h, cos.shape, settings, plain)) is not None]
        if len(calls) != len(heads) or len({call.form for call in calls}) > 1:
            return None
        beside = list(calls[0].form.tables(cos, sin))
        if torch.is_grad_enabled() and any(h.requires_grad for h in heads):
            # Somebody may write to tables of which the function keeps copies.
            kept = dtypes[first.dtype, cos.dtype]
            beside = [table if keeps else table.clone() for table, keeps in zip(beside, kept, strict=True)]
        turned = [rotary(h, *beside, None, None, call.options) for call, h in zip(calls, heads, strict=True)]
        return turned[0] if len(turned) == 1 else tuple(turned)

    def _bound(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any] | None:
        """The arguments in the order of the parameters."""
        if len(args) > len(self.names) or not all(name in self.names[len(args) :] for name in kwargs):
            return None
        given = list(args)
        for name in self.names[len(args) :]:
            if name not in kwargs and name not in self.defaults:
                return None
            given.append(kwargs[name] if name in kwargs else self.defaults[name])
        return given

    def _call(self, heads: Tensor, table: Sequence[int], settings: Settings, are_contiguous: bool) -> Call | None:
        """What turns such heads beside tables of that shape."""
        columns, entries = heads.shape[-1], table[-1]
        ones = tuple([size == 1 for size in table[:-1]])
        found = self.forms.get(Kind(settings, heads.dim(), ones, entries == columns))
        options = None if found is None else found.form.options(columns, entries)
        if found is None or options is None or (options.rotary_dim < columns and not found.is_partial):
            return None
        # To torch.cat parts of one column may look like those of a map whose channels come last.
        if options.rotary_dim < 4:
            return None
        lead, whole = found.form.lead(table), heads.shape[:-1]
        # Results of heads that lie in another way, or of expanded ones, lie as torch likes.
        strides = heads.stride()
        if len(lead) > len(whole) or not heads.numel() or strides[-1] != 1 or 0 in strides:
            return None
        if not (found.takes_any_tables or are_contiguous):
            return None
        if any(size not in (1, other) for size, other in zip(reversed(lead), reversed(whole), strict=False)):
            return None
        return Call(found.form, options._replace(contiguous=not found.keeps_strides))


def parameters_of(function: types.FunctionType) -> tuple[list[str], dict[str, Any]]:
    parameters = inspect.signature(function, follow_wrapped=False).parameters.values()
    if any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters):
        raise NotTriable("takes arguments in a way of its own")
    return [p.name for p in parameters], {p.name: p.default for p in parameters if p.default is not p.empty}
