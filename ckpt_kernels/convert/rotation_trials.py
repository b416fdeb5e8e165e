"""Trying out what functions turn queries and keys: on small random tensors, results and gradients.

See `rotations` for what is found.
"""

import itertools
import types
from collections.abc import Callable, Iterator
from typing import Any

from .called import is_torchs
from .reached import Code, NotTried
from .reached_functions import read_function
from .remembering import remembered
from .rotation_results import beside_ones, dtypes_of, has_gradients_of, holds_for_all
from .rotation_runs import Arrangement, Trial
from .rotations import Form, Found, Kind, Rotation, parameters_of
from .trial import in_a_thread_of_its_own

# What such a function may name of tensors and of torch.
_NAMES = frozenset(
    """Tensor cat chunk dtype flatten float neg repeat_interleave reshape shape size stack to torch transpose type_as
    unbind unsqueeze view""".split()
)
_LAYOUTS = ("halves", "interleaved")
# Where tables may get another dimension.
_DIMENSIONS = (-2, 0, 1, 2)


def exchanged_rotation(function: types.FunctionType) -> Callable[[Any], Any]:
    """Of what is about to be called: ours if that is `function`, and anything else as it is."""
    rotation = rotation_of(function)

    def call(*args: Any, **kwargs: Any) -> Any:
        turned = None if rotation is None else rotation.of(args, kwargs)
        return function(*args, **kwargs) if turned is None else turned

    return lambda called: call if called is function else called


@remembered
def rotation_of(function: Any) -> Rotation | None:
    """What a function turns, by trying it out; None where it does nothing of that kind."""
    if type(function) is not types.FunctionType or is_torchs(function):
        return None
    try:
        names, defaults = parameters_of(function)
        required = [name for name in names if name not in defaults]
        if len(required) not in (3, 4):
            return None
        return _tried_out(function, read_function(function, _NAMES))
    except NotTried:
        return None


@in_a_thread_of_its_own
def _tried_out(function: types.FunctionType, code: Code) -> Rotation | None:
    names, defaults = parameters_of(function)
    required = len(names) - len(defaults)
    *heads, first, second = range(required)
    optional = list(defaults.values())
    if any(type(value) not in (int, type(None)) for value in optional):
        return None
    for places in ((*heads, first, second), (*heads, second, first)):
        rotation = Rotation(function, places, code)
        for others in _others(optional):
            trial = Trial(function, places, others)
            for arrangement in _arrangements():
                for is_whole in (True, False):
                    _find(rotation, trial, others, arrangement, is_whole)
        if rotation.forms:
            return rotation
    return None


def _find(rotation: Rotation, trial: Trial, others: tuple[Any, ...], arrangement: Arrangement, is_whole: bool) -> None:
    """Adds the forms of one kind of operands, and of those like them that have ones among the tables' sizes."""
    dims, lead, *_ = arrangement
    none = (False,) * len(lead)
    found = None if Kind(others, dims, none, is_whole) in rotation.forms else _found(trial, arrangement, is_whole)
    if found is None:
        return
    sizes = (16, 16 if is_whole else 8)
    if not rotation.dtypes:
        rotation.dtypes = dtypes_of(trial, found.form, arrangement, *sizes)
    for ones in itertools.product((False, True), repeat=len(lead)):
        beside = beside_ones(trial, found, arrangement, ones, *sizes)
        if beside is not None:
            rotation.forms[Kind(others, dims, ones, is_whole)] = beside


def _others(optional: list[Any]) -> Iterator[tuple[Any, ...]]:
    """Values of the arguments that have defaults: a dimension, which is one of the numbers, may be another one."""
    yield tuple(optional)
    for place, value in enumerate(optional):
        if type(value) is int:
            for dimension in _DIMENSIONS:
                if dimension != value:
                    yield (*optional[:place], dimension, *optional[place + 1 :])


def _arrangements() -> Iterator[Arrangement]:
    for dims in (4, 3):
        for lead in ((5,), (2, 5), (2, 5, 3)):
            for unsqueeze in (None, *range(len(lead) + 1)):
                if len(lead) + (unsqueeze is not None) < dims:
                    yield Arrangement(dims, lead, unsqueeze)


def _found(trial: Trial, arrangement: Arrangement, is_whole: bool) -> Found | None:
    """The form in which the function turns heads that are arranged in that way."""
    sizes = ((8, 8), (12, 12), (32, 32)) if is_whole else ((16, 8), (24, 12), (32, 16))
    kinds = itertools.product(("full", "half", "first half"), _LAYOUTS, _LAYOUTS, (False, True), (False, True))
    forms = [Form(arrangement.unsqueeze, *kind) for kind in kinds]
    for columns, entries in sizes:
        forms = trial.fitting(forms, trial.operands(arrangement, columns, entries))
        if not forms:
            return None
    is_partial = not is_whole and forms[0].table != "half"
    if not is_whole:
        # Whether it turns a part of longer heads, or does not take them.
        longer = trial.operands(arrangement, 40, 8)
        if trial.run(longer) is not None:
            forms, is_partial = trial.fitting(forms, longer), True
        elif is_partial:
            return None
    if not is_partial:
        # Where all columns turn, none of them are the last.
        forms = [form for form in forms if not form.at_end]
    if len(forms) != 1 or not has_gradients_of(trial, forms[0], trial.operands(arrangement, *sizes[0])):
        return None
    return Found(forms[0], is_partial) if holds_for_all(trial, forms[0], arrangement, is_whole, is_partial) else None
