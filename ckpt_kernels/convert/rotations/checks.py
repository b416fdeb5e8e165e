"""What a trial has to show of a function that turns heads beside one form: results of other sizes, how they lie, their
gradients and dtypes, and what autograd keeps for them."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...ops.operands import elementwise_empty
from .forms import Dtypes, Form, Found
from .trial_runs import Arrangement, Trial, are_close, expected

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Heads of which a trial sees each part that is shorter than a quarter of them.
_SEEN = 32


def holds_for_all(trial: Trial, form: Form, arrangement: Arrangement, is_whole: bool, is_partial: bool) -> bool:
    """Whether a function turns heads of all lengths.

    Parts are bounded by other lengths, or half of them: see `code.slices`. Where all that are taken are quarters of
    heads and halves of what turns, results are those of a form for all lengths if they are for those that leave each
    remainder by four, be there more or less columns that do not turn.
    """
    operands = trial.operands(arrangement.larger(), _SEEN, _SEEN if is_whole else _SEEN // 2)
    if not trial.fitting([form], operands, _SEEN // 4):
        return False
    lengths = [(n, n) for n in range(2, 17, 2)] if is_whole or form.table == "half" else []
    if is_partial:
        lengths += [(n, turned) for n in range(9, 17) for turned in (2, 4, 6, 8) if turned < n]
    return all(
        trial.fitting([form], trial.operands(arrangement, columns, turned // 2 if form.table == "half" else turned))
        for columns, turned in lengths
    )


def has_gradients_of(trial: Trial, form: Form, operands: Sequence[Tensor]) -> bool:
    """What is detached would have none, and what a function of somebody's own has may be anything."""
    *heads, cos, sin = operands
    given, again = ([h.clone().requires_grad_() for h in heads] for _ in range(2))
    results = trial.run((*given, cos, sin))
    if results is None or not all(r.requires_grad for r in results):
        return False
    incoming = [trial.random(h.shape) for h in heads]
    outputs: list[Any] = [expected(form, h, cos, sin) for h in again]
    try:
        found = torch.autograd.grad(results, given, incoming, allow_unused=True)
    except RuntimeError:
        return False
    wanted = torch.autograd.grad(outputs, again, incoming)
    return all(f is not None and are_close(f, w) for f, w in zip(found, wanted, strict=True))


def beside_ones(
    trial: Trial, found: Found, arrangement: Arrangement, ones: tuple[bool, ...], columns: int, entries: int
) -> Found | None:
    """The form where these dimensions of tables have size 1, with how its results lie."""
    operands = trial.operands(arrangement, columns, entries, ones)
    if not trial.fitting([found.form], operands):
        return None
    *heads, cos, sin = operands
    lying = _how_results_lie(trial, [[lay(h) for h in heads] for lay in _OF_HEADS], [[cos, sin]])
    if lying is None:
        return None
    others = [[lay(table) for table in (cos, sin)] for lay in _OF_TABLES]
    takes_any = _how_results_lie(trial, [[_turned(h) for h in heads]], others) is lying
    return found._replace(keeps_strides=lying, takes_any_tables=takes_any)


def _how_results_lie(trial: Trial, each: Sequence[list[Tensor]], tables: Sequence[list[Tensor]]) -> bool | None:
    """Whether results have the strides of elementwise ones, or are contiguous, whatever heads have; None if neither."""
    keeps, contiguous = True, True
    for heads in each:
        for pair in tables:
            results = trial.run((*heads, *pair))
            if results is None:
                return None
            keeps &= all(r.stride() == elementwise_empty(h).stride() for r, h in zip(results, heads, strict=True))
            contiguous &= all(r.is_contiguous() for r in results)
    return True if keeps else False if contiguous else None


def _turned(heads: Tensor) -> Tensor:
    """Heads after tokens that lie before them."""
    return heads.transpose(-3, -2).contiguous().transpose(-3, -2)


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, -2).contiguous().transpose(0, -2)


def _packed(heads: Tensor) -> Tensor:
    return torch.cat((heads, heads), -1)[..., : heads.shape[-1]]


def _columns_first(table: Tensor) -> Tensor:
    return table.transpose(-1, -2).contiguous().transpose(-1, -2)


def _expanded(table: Tensor) -> Tensor:
    return table[:1].expand(table.shape)


_OF_HEADS = (_transposed, _turned, _packed, Tensor.contiguous)
_OF_TABLES = (_transposed, _columns_first, _expanded)


def dtypes_of(trial: Trial, form: Form, arrangement: Arrangement, columns: int, entries: int) -> Dtypes:
    """Those of heads and tables for which results have the heads', and whether autograd keeps the tables themselves."""
    operands = trial.operands(arrangement, columns, entries)
    taken = {}
    for dtype, table in dict.fromkeys((d, t) for d in _DTYPES for t in (d, torch.float32)):
        *heads, cos, sin = [*(h.to(dtype) for h in operands[:-2]), *(t.to(table) for t in operands[-2:])]
        results = trial.run((*heads, cos, sin))
        if results is None or any(r.dtype != dtype for r in results):
            continue
        wanted: list[Any] = [expected(form, h.double(), cos.double(), sin.double()) for h in heads]
        bound = 16 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
        if all(torch.allclose(r.double(), w, rtol=bound, atol=bound) for r, w in zip(results, wanted, strict=True)):
            kept = list(_kept(trial, heads, cos, sin))
            taken[dtype, table] = all(cos for cos, _ in kept), all(sin for _, sin in kept)
    return taken


def _kept(trial: Trial, heads: Sequence[Tensor], *tables: Tensor) -> Iterator[tuple[bool, bool]]:
    """Whether autograd keeps the memory of the cosine and the sine, however they lie."""
    for lay in (Tensor.contiguous, *_OF_TABLES):
        given = trial.way.arguments_of(*map(lay, tables))
        held = None if given is None else trial.way.tables_in(given)
        if given is None or held is None:
            yield False, False
            continue
        kept: set[int] = set()

        def pack(tensor: Tensor, kept: set[int] = kept) -> Tensor:
            kept.add(tensor.untyped_storage().data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed):
            results = trial.run_beside([h.detach().requires_grad_() for h in heads], given)
        # Without results, which hold what is kept, its memory may be anybody's.
        holds = [results is not None and table.untyped_storage().data_ptr() in kept for table in held]
        yield holds[0], holds[1]
