"""Checks of a rotation beyond the results for one form: other sizes, strides, gradients, dtypes, and saved tensors."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...ops.operands import elementwise_empty
from ..rules.trial import recording_saved_tensors
from .forms import DtypesCase, Form, KnownForm, SupportedDtypes
from .trial_runs import Arrangement, Trial, are_close, reference_result

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# A number of columns of which every part that is not a multiple of a quarter would show.
_COLUMNS = 32


def holds_for_all(trial: Trial, form: Form, arrangement: Arrangement, is_whole: bool, is_partial: bool) -> bool:
    """Whether a function rotates heads with any number of columns by the form.

    `code.size_independence` bounds slices by lengths or half of them. If all parts that the function takes are quarters
    of heads and halves of the rotated columns, then results are those of the form for all lengths as soon as they are
    for lengths with every remainder by four, with more or fewer columns that are not rotated.
    """
    operands = trial.operands(arrangement.larger(), _COLUMNS, _COLUMNS if is_whole else _COLUMNS // 2)
    if not trial.matching_forms([form], operands, _COLUMNS // 4):
        return False
    lengths = [(n, n) for n in range(2, 17, 2)] if is_whole or form.table == "half" else []
    if is_partial:
        lengths += [(n, rotated) for n in range(9, 17) for rotated in (2, 4, 6, 8) if rotated < n]
    for columns, rotated in lengths:
        entries = rotated // 2 if form.table == "half" else rotated
        if not trial.matching_forms([form], trial.operands(arrangement, columns, entries)):
            return False
    return True


def has_same_gradients(trial: Trial, form: Form, operands: Sequence[Tensor]) -> bool:
    """Whether the gradients are those of the form: a function may detach, or use a custom `autograd.Function`."""
    *heads, cos, sin = operands
    inputs, reference_inputs = ([h.clone().requires_grad_() for h in heads] for _ in range(2))
    results = trial.run((*inputs, cos, sin))
    if results is None or not all(r.requires_grad for r in results):
        return False
    incoming = [trial.random(h.shape) for h in heads]
    references: list[Any] = [reference_result(form, h, cos, sin) for h in reference_inputs]
    try:
        gradients = torch.autograd.grad(results, inputs, incoming, allow_unused=True)
    except RuntimeError:
        return False
    expected = torch.autograd.grad(references, reference_inputs, incoming)
    return all(g is not None and are_close(g, e) for g, e in zip(gradients, expected, strict=True))


def with_broadcast_dims(
    trial: Trial, known: KnownForm, arrangement: Arrangement, ones: tuple[bool, ...], columns: int, entries: int
) -> KnownForm | None:
    """The form for tables with size 1 in these dimensions, with the strides of results; None if it does not hold."""
    operands = trial.operands(arrangement, columns, entries, ones)
    if not trial.matching_forms([known.form], operands):
        return None
    *heads, cos, sin = operands
    keeps_strides = _keeps_strides(trial, [[lay_out(h) for h in heads] for lay_out in _HEAD_LAYOUTS], [[cos, sin]])
    if keeps_strides is None:
        return None
    other_tables = [[lay_out(table) for table in (cos, sin)] for lay_out in _TABLE_LAYOUTS]
    takes_any = _keeps_strides(trial, [[_tokens_before_heads(h) for h in heads]], other_tables) is keeps_strides
    return known._replace(keeps_strides=keeps_strides, takes_any_tables=takes_any)


def _keeps_strides(trial: Trial, all_heads: Sequence[list[Tensor]], tables: Sequence[list[Tensor]]) -> bool | None:
    """True if results have the strides of an elementwise op on heads, False if they are contiguous, None otherwise."""
    keeps, contiguous = True, True
    for heads in all_heads:
        for pair in tables:
            results = trial.run((*heads, *pair))
            if results is None:
                return None
            keeps &= all(r.stride() == elementwise_empty(h).stride() for r, h in zip(results, heads, strict=True))
            contiguous &= all(r.is_contiguous() for r in results)
    return True if keeps else False if contiguous else None


def _swapped(first: int, second: int) -> Callable[[Tensor], Tensor]:
    """A function that gives a tensor the memory layout of the tensor with two dimensions swapped."""
    return lambda tensor: tensor.transpose(first, second).contiguous().transpose(first, second)


def _packed(heads: Tensor) -> Tensor:
    return torch.cat((heads, heads), -1)[..., : heads.shape[-1]]


def _expanded(table: Tensor) -> Tensor:
    return table[:1].expand(table.shape)


_tokens_before_heads = _swapped(-3, -2)
_HEAD_LAYOUTS = (_swapped(0, -2), _tokens_before_heads, _packed, Tensor.contiguous)
_TABLE_LAYOUTS = (_swapped(0, -2), _swapped(-1, -2), _expanded)


def dtypes_of(trial: Trial, form: Form, arrangement: Arrangement, columns: int, entries: int) -> SupportedDtypes:
    """The dtypes of heads and tables for which results have the dtype of heads or, if that is float32, of tables."""
    operands = trial.operands(arrangement, columns, entries)
    supported = {}
    for dtype, table in dict.fromkeys((d, t) for d in _DTYPES for t in (d, torch.float32)):
        *heads, cos, sin = [*(h.to(dtype) for h in operands[:-2]), *(t.to(table) for t in operands[-2:])]
        results = trial.run((*heads, cos, sin))
        result_dtypes = set() if results is None else {r.dtype for r in results}
        if results is None or result_dtypes not in ({dtype}, {torch.promote_types(dtype, table)}):
            continue
        expected: list[Any] = [reference_result(form, h.double(), cos.double(), sin.double()) for h in heads]
        widens = result_dtypes != {dtype}
        bound = 16 * max(torch.finfo(table if widens else dtype).eps, torch.finfo(torch.float32).eps)
        if all(torch.allclose(r.double(), e, rtol=bound, atol=bound) for r, e in zip(results, expected, strict=True)):
            saved = list(_saves_tables(trial, heads, cos, sin))
            saves_tables = all(cos for cos, _ in saved), all(sin for _, sin in saved)
            supported[dtype, table] = DtypesCase(saves_tables, widens)
    return supported


def _saves_tables(trial: Trial, heads: Sequence[Tensor], *tables: Tensor) -> Iterator[tuple[bool, bool]]:
    """Whether autograd saves the storage of the cosines and of the sines, for each memory layout of tables."""
    for lay_out in (Tensor.contiguous, *_TABLE_LAYOUTS):
        arguments = trial.convention.table_arguments(*map(lay_out, tables))
        passed = None if arguments is None else trial.convention.tables_in(arguments)
        if arguments is None or passed is None:
            yield False, False
            continue
        with recording_saved_tensors() as is_saved:
            results = trial.run_with_tables([h.detach().requires_grad_() for h in heads], arguments)
        # Results hold the saved tensors. Without results the memory is free, and an address says nothing.
        cos, sin = (results is not None and is_saved(table) for table in passed)
        yield cos, sin
