"""Trying out what functions turn queries and keys: on small random tensors, results and gradients.

See `rotations` for what is found. A trial ends at the first operation that is not on the list of those allowed.
"""

import itertools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import reference
from ..backends.blocks import Rotary
from ..ops.operands import elementwise_empty
from .called import is_torchs, names_in
from .reached import Code, NotTried
from .reached_functions import read_function
from .remembering import remembered
from .rotation_runs import Trial
from .rotations import Form, Found, Kind, Rotation, Way, is_setting, parameters_of, settings_of
from .trial import in_a_thread_of_its_own

# What such a function may name of tensors and of torch.
_NAMES = frozenset(
    """Tensor cat chunk device dtype empty_like flatten float neg repeat_interleave reshape shape size stack to torch
    transpose type_as unbind unflatten unsqueeze view view_as_complex view_as_real""".split()
)
_LAYOUTS = ("halves", "interleaved")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Where tables may get another dimension, and ways to choose.
_CHOICES: dict[type, tuple[Any, ...]] = {int: (-2, -1, 0, 1, 2), bool: (False, True)}


def exchanged_rotation(function: types.FunctionType) -> Callable[[Any], Any]:
    """Of what is about to be called: ours if that is `function`, and anything else as it is."""
    rotation = rotation_of(function)

    def call(*args: Any, **kwargs: Any) -> Any:
        turned = None if rotation is None else rotation.of(args, kwargs)
        return function(*args, **kwargs) if turned is None else turned

    return lambda called: call if called is function else called


def exchanged_local_rotation(function: types.FunctionType) -> Callable[[Any], Any]:
    """The same of a function that may be made anew each time, by a `def`."""
    exchange = exchanged_rotation(function)

    def is_one(called: Any) -> bool:
        if called is function:
            return True
        # Of a function within a frame that torch.compile traces nothing can be asked.
        if torch.compiler.is_compiling():
            return False
        plain = type(called) is types.FunctionType and called.__globals__ is function.__globals__
        plain = plain and called.__closure__ is called.__defaults__ is called.__kwdefaults__ is None
        return plain and called.__code__ == function.__code__

    return lambda called: exchange(function) if is_one(called) else called


def rotation_of(function: Any) -> Rotation | None:
    """What a function turns, by trying it out; None where it does nothing of that kind."""
    if type(function) is not types.FunctionType or is_torchs(function):
        return None
    found = _found_out(function)
    return found if isinstance(found, Rotation) else None


def why_no_rotation(function: types.FunctionType) -> str:
    """For people."""
    found = _found_out(function)
    return "" if isinstance(found, Rotation) else found


@remembered
def _found_out(function: types.FunctionType) -> Rotation | str:
    try:
        names, defaults = parameters_of(function)
        if len(names) - len(defaults) not in (2, 3, 4) or not all(map(is_setting, defaults.values())):
            return "takes something else than one or two heads, their tables, and settings that are numbers"
        found = _tried_out(function, read_function(function, _NAMES))
    except NotTried as error:
        return str(error)
    return "turns nothing as ours does" if found is None else found


@in_a_thread_of_its_own
def _tried_out(function: types.FunctionType, code: Code) -> Rotation | None:
    names, defaults = parameters_of(function)
    rotation = Rotation(function, code)
    for others in _others(list(defaults.values())):
        settings = settings_of(others)
        for way in _ways(len(names) - len(defaults), "view_as_complex" in names_in(function.__code__)):
            trial = Trial(function, way, others)
            for dims, lead, unsqueeze in _arrangements():
                for is_whole in (True, False):
                    kind = Kind(settings, dims, len(lead), is_whole)
                    if kind not in rotation.forms:
                        found = _found(trial, way.heads, dims, lead, unsqueeze, is_whole)
                        if found is not None:
                            rotation.forms[kind] = found
            forms = {kind: found for kind, found in rotation.forms.items() if kind.settings == settings}
            if forms:
                rotation.ways[settings] = way, _dtypes(trial, way.heads, *next(iter(forms.items())))
                break
    return rotation if any(dtypes for _, dtypes in rotation.ways.values()) else None


def _ways(required: int, may_be_complex: bool) -> Iterator[Way]:
    """How so many arguments may be heads and tables."""
    heads = range(required - 2)
    if heads:
        yield Way(len(heads), (*heads, required - 2, required - 1))
        yield Way(len(heads), (*heads, required - 1, required - 2))
    if required < 4:
        for tables in ("cos, sin", "sin, cos", *(("complex",) if may_be_complex else ())):
            yield Way(required - 1, tuple(range(required)), tables)


def _others(defaults: list[Any]) -> Iterator[tuple[Any, ...]]:
    """Values of the arguments that have defaults: as they are, and with one or two of them another. Numbers may be
    dimensions."""
    choices = [[v for v in _CHOICES.get(type(value), ()) if v != value] for value in defaults]
    yield tuple(defaults)
    for count in (1, 2):
        for places in itertools.combinations(range(len(defaults)), count):
            for values in itertools.product(*(choices[place] for place in places)):
                instead = dict(zip(places, values, strict=True))
                yield tuple(instead.get(place, value) for place, value in enumerate(defaults))


def _arrangements() -> Iterator[tuple[int, tuple[int, ...], int | None]]:
    """How many dimensions heads have, the sizes of a table's but for its last, and where it gets another."""
    for dims in (4, 3):
        for lead in ((5,), (2, 5), (2, 5, 3)):
            for unsqueeze in (None, *range(len(lead) + 1)):
                if len(lead) + (unsqueeze is not None) < dims:
                    yield dims, lead, unsqueeze


def _shapes(dims: int, lead: tuple[int, ...], unsqueeze: int | None, columns: int) -> list[tuple[int, ...]]:
    """Of queries and keys beside such a table, which differ in what it is the same for."""
    whole = list(lead)
    shapes = []
    for heads in (3, 4):
        sizes = [*whole] if unsqueeze is None else [*whole[:unsqueeze], heads, *whole[unsqueeze:]]
        shapes.append((*(6, heads + 4)[: dims - 1 - len(sizes)], *sizes, columns))
    return shapes


def _expected(form: Form, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor | None:
    options = form.options(heads.shape[-1], cos.shape[-1])
    if options is None:
        return None
    return reference.rotary(Rotary(heads, *form.tables(cos, sin), None, None, options))


def _found(
    trial: Trial, count: int, dims: int, lead: tuple[int, ...], unsqueeze: int | None, is_whole: bool
) -> Found | None:
    """The form in which the function turns heads of so many dimensions by such a table."""
    sizes = ((8, 8), (12, 12), (32, 32)) if is_whole else ((16, 8), (24, 12), (32, 16))
    tables = ("full", "half", "first half", "neighbours")
    kinds = itertools.product(tables, _LAYOUTS, _LAYOUTS, (False, True), (False, True))
    forms = [Form(unsqueeze, *kind) for kind in kinds]
    for columns, entries in sizes:
        forms = _fitting(trial, forms, _operands(trial, count, dims, lead, unsqueeze, columns, entries))
        if not forms:
            return None
    is_partial = not is_whole and forms[0].table != "half"
    if not is_whole:
        # Whether it turns a part of longer heads, or does not take them.
        longer = _operands(trial, count, dims, lead, unsqueeze, 40, 8)
        if trial.run(longer) is not None:
            forms, is_partial = _fitting(trial, forms, longer), True
        elif is_partial:
            return None
    if not is_partial:
        # Where all columns turn, none of them are the last.
        forms = [form for form in forms if not form.at_end]
    smallest = _operands(trial, count, dims, lead, unsqueeze, *sizes[0])
    if len(forms) != 1 or not _has_gradients_of(trial, forms[0], smallest):
        return None
    lying = _how_results_lie(trial, count, dims, lead, unsqueeze, *sizes[0])
    return None if lying is None else Found(forms[0], is_partial, lying)


def _operands(
    trial: Trial, count: int, dims: int, lead: tuple[int, ...], unsqueeze: int | None, columns: int, entries: int
) -> list[Tensor]:
    heads = [trial.random(shape) for shape in _shapes(dims, lead, unsqueeze, columns)[:count]]
    return [*heads, trial.random((*lead, entries)), trial.random((*lead, entries))]


def _fitting(trial: Trial, forms: Sequence[Form], operands: Sequence[Tensor]) -> list[Form]:
    """Those whose results are those of the function."""
    *heads, cos, sin = operands
    results = trial.run(operands)
    if results is None:
        return []
    found = []
    for form in forms:
        expected = (_expected(form, h, cos, sin) for h in heads)
        if all(e is not None and _are_close(r, e) for r, e in zip(results, expected, strict=True)):
            found.append(form)
    return found


def _has_gradients_of(trial: Trial, form: Form, operands: Sequence[Tensor]) -> bool:
    """What is detached would have none, and what a function of somebody's own has may be anything."""
    *heads, cos, sin = operands
    given, again = ([h.clone().requires_grad_() for h in heads] for _ in range(2))
    results = trial.run((*given, cos, sin))
    if results is None or not all(r.requires_grad for r in results):
        return False
    incoming = [trial.random(h.shape) for h in heads]
    expected: list[Any] = [_expected(form, h, cos, sin) for h in again]
    try:
        found = torch.autograd.grad(results, given, incoming, allow_unused=True)
    except RuntimeError:
        return False
    wanted = torch.autograd.grad(expected, again, incoming)
    return all(f is not None and _are_close(f, w) for f, w in zip(found, wanted, strict=True))


def _are_close(found: Tensor, expected: Tensor) -> bool:
    """To what float32 can tell, in which a function may compute whatever it is given."""
    return found.dtype == expected.dtype and torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


def _how_results_lie(trial: Trial, count: int, *arrangement: Any) -> bool | None:
    """Whether results have the strides of elementwise ones, or are contiguous, whatever heads have; None if neither."""
    *heads, cos, sin = _operands(trial, count, *arrangement)
    keeps, contiguous = True, True
    for lay in (_transposed, _packed, Tensor.contiguous):
        lying = [lay(h) for h in heads]
        results = trial.run((*lying, cos, sin))
        if results is None:
            return None
        keeps &= all(r.stride() == elementwise_empty(h).stride() for r, h in zip(results, lying, strict=True))
        contiguous &= all(r.is_contiguous() for r in results)
    return True if keeps else False if contiguous else None


def _transposed(heads: Tensor) -> Tensor:
    return heads.transpose(0, -2).contiguous().transpose(0, -2)


def _packed(heads: Tensor) -> Tensor:
    return torch.cat((heads, heads), -1)[..., : heads.shape[-1]]


def _dtypes(trial: Trial, heads: int, kind: Kind, found: Found) -> frozenset[tuple[torch.dtype, torch.dtype]]:
    """Those of heads and tables for which results have the heads'."""
    lead = ((5,), (2, 5), (2, 5, 3))[kind.table_dims - 1]
    sizes = (16, 16) if kind.is_whole else (16, 8)
    operands = _operands(trial, heads, kind.dims, lead, found.form.unsqueeze, *sizes)
    taken = set()
    for dtype, table in {(d, t) for d in _DTYPES for t in (d, torch.float32)}:
        *given, cos, sin = [*(h.to(dtype) for h in operands[:-2]), *(t.to(table) for t in operands[-2:])]
        results = trial.run((*given, cos, sin))
        if results is None or any(r.dtype != dtype for r in results):
            continue
        expected: list[Any] = [_expected(found.form, h.double(), cos.double(), sin.double()) for h in given]
        bound = 16 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
        if all(torch.allclose(r.double(), e, rtol=bound, atol=bound) for r, e in zip(results, expected, strict=True)):
            taken.add((dtype, table))
    return frozenset(taken)
