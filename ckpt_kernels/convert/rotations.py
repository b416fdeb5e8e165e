"""Functions that turn queries and keys by the angles of tables: `apply_rotary_pos_emb(q, k, cos, sin)` and its kin.

Such a function is known by trying it out on small random tensors, and by nothing else: in which order it takes its
operands, which elements are pairs, how tables stand beside heads. It must be a function of its arguments alone, without
a decision in it (see `reached_functions`). A call of it then is one of ours, where its operands are of the kinds
that were tried; else it is what was written.
"""

import inspect
import types
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.blocks import RotaryOptions
from ..ops.rotary import rotary
from .operands import is_operand
from .reached import Code, NotTried


class Form(NamedTuple):
    """How heads turn. A table gets a dimension at `unsqueeze`; then it has an entry for each column that turns
    ("full"), for each pair ("half"), or twice as many as are read ("first half"). What does not turn comes first where
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
        return self._entries(cos), self._entries(-sin if self.back else sin)

    def lead(self, shape: Sequence[int]) -> list[int]:
        """The sizes, but for the last, of a table of that shape as it stands beside heads."""
        lead = list(shape[:-1])
        if self.unsqueeze is not None:
            lead.insert(self.unsqueeze, 1)
        return lead

    def _entries(self, table: Tensor) -> Tensor:
        if self.table == "first half":
            table = table[..., : table.shape[-1] // 2]
        return table if self.unsqueeze is None else table.unsqueeze(self.unsqueeze)


class Kind(NamedTuple):
    """What a form is known for: the arguments that are no operands, the dimensions of heads, whether each of those of
    tables before their last has size 1, and whether tables have as many columns as heads."""

    others: tuple[Any, ...]
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


class Rotation:
    """A function that turns heads: the places of its operands, one or two and then cos and sin, and its forms."""

    def __init__(self, function: types.FunctionType, places: tuple[int, ...], code: Code) -> None:
        self.places = places
        self.code = code
        self.forms: dict[Kind, Found] = {}
        # For dtypes of heads and tables whether autograd keeps the cosine and the sine themselves, else copies of them.
        self.dtypes: dict[tuple[torch.dtype, torch.dtype], tuple[bool, bool]] = {}
        self.names, self.defaults = parameters_of(function)

    def of(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The results, or None where the function itself has to compute them."""
        given = self._bound(args, kwargs)
        if given is None or not self.code.is_same():
            return None
        *heads, cos, sin = [given[place] for place in self.places]
        others = tuple(value for place, value in enumerate(given) if place not in self.places)
        if not all(map(is_operand, (*heads, cos, sin))) or not all(type(o) in (int, type(None)) for o in others):
            return None
        first = heads[0]
        fits = cos.shape == sin.shape and cos.dtype == sin.dtype and cos.dim() > 0 and first.dim() > 0
        fits = fits and (first.dtype, cos.dtype) in self.dtypes and all(h.dtype == first.dtype for h in heads)
        fits = fits and all(t.device == first.device for t in (*heads, cos, sin))
        if not fits or (torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)):
            return None
        calls = [call for h in heads if (call := self._call(h, cos, sin, others)) is not None]
        if len(calls) != len(heads) or len({call.form for call in calls}) > 1:
            return None
        tables = list(calls[0].form.tables(cos, sin))
        if torch.is_grad_enabled() and any(h.requires_grad for h in heads):
            # Somebody may write to tables of which the function keeps copies.
            kept = self.dtypes[first.dtype, cos.dtype]
            tables = [table if keeps else table.clone() for table, keeps in zip(tables, kept, strict=True)]
        turned = [rotary(h, *tables, None, None, call.options) for call, h in zip(calls, heads, strict=True)]
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

    def _call(self, heads: Tensor, cos: Tensor, sin: Tensor, others: tuple[Any, ...]) -> Call | None:
        """What turns such heads."""
        columns, entries = heads.shape[-1], cos.shape[-1]
        ones = tuple([size == 1 for size in cos.shape[:-1]])
        found = self.forms.get(Kind(others, heads.dim(), ones, entries == columns))
        options = None if found is None else found.form.options(columns, entries)
        if found is None or options is None or (options.rotary_dim < columns and not found.is_partial):
            return None
        # To torch.cat parts of one column may look like those of a map whose channels come last.
        if options.rotary_dim < 4:
            return None
        lead, whole = found.form.lead(cos.shape), heads.shape[:-1]
        # Results of heads that lie in another way, or of expanded ones, lie as torch likes.
        strides = heads.stride()
        if len(lead) > len(whole) or not heads.numel() or strides[-1] != 1 or 0 in strides:
            return None
        if not (found.takes_any_tables or (cos.is_contiguous() and sin.is_contiguous())):
            return None
        if any(size not in (1, other) for size, other in zip(reversed(lead), reversed(whole), strict=False)):
            return None
        return Call(found.form, options._replace(contiguous=not found.keeps_strides))


def parameters_of(function: types.FunctionType) -> tuple[list[str], dict[str, Any]]:
    parameters = inspect.signature(function, follow_wrapped=False).parameters.values()
    if any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters):
        raise NotTried("takes arguments in a way of its own")
    return [p.name for p in parameters], {p.name: p.default for p in parameters if p.default is not p.empty}
