"""Trying out what functions turn queries and keys: on small random tensors, results and gradients.

See `forms` for what is found.
"""

import ast
import itertools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ..code.call_graph import belongs_to_torch
from ..code.code_objects import names_in
from ..code.function_reachability import read_function
from ..code.memoization import memoized
from ..code.reachability import CodeSnapshot, NotTriable
from ..rules.trial import in_a_thread_of_its_own
from .checks import dtypes_of, has_same_gradients, holds_for_all, with_broadcast_dims
from .forms import (
    CallConvention,
    Form,
    KnownForm,
    OperandKind,
    Rotation,
    Settings,
    SupportedDtypes,
    is_setting,
    parameters_of,
    settings_of,
)
from .trial_runs import Arrangement, Trial

# What such a function may name of tensors and of torch.
_NAMES = frozenset(
    """Tensor cat chunk device dtype empty_like flatten float neg repeat_interleave reshape shape size stack to torch
    transpose type_as unbind unflatten unsqueeze view view_as_complex view_as_real""".split()
)
_TABLES = ("full", "half", "first half", "neighbours")
_LAYOUTS = ("halves", "interleaved")
# Where tables may get another dimension, and ways to choose.
_CHOICES: dict[type, tuple[Any, ...]] = {int: (-2, -1, 0, 1, 2), bool: (False, True)}


def replacing_rotation(function: types.FunctionType, settings: tuple[str, ...] | None = None) -> Callable[[Any], Any]:
    """Of what is about to be called: ours if that is `function`, and anything else as it is."""
    rotation = rotation_of(function, settings)

    def call(*args: Any, **kwargs: Any) -> Any:
        turned = None if rotation is None else rotation.of(args, kwargs)
        return function(*args, **kwargs) if turned is None else turned

    return lambda called: call if called is function else called


def replacing_local_rotation(
    function: types.FunctionType, settings: tuple[str, ...] | None = None
) -> Callable[[Any], Any]:
    """The same of a function that may be made anew each time, by a `def`."""
    exchange = replacing_rotation(function, settings)

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


def settings_in(call: ast.Call, function: types.FunctionType) -> tuple[str, ...]:
    """The arguments with a default that a call gives, or may give."""
    if any(isinstance(given, ast.Starred) for given in call.args) or None in [k.arg for k in call.keywords]:
        return _settings_of(function)
    given = {*function.__code__.co_varnames[: len(call.args)], *(keyword.arg for keyword in call.keywords)}
    return tuple(name for name in _settings_of(function) if name in given)


def _settings_of(function: types.FunctionType) -> tuple[str, ...]:
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return names[len(names) - len(function.__defaults__ or ()) :]


def is_rotation(function: Any) -> bool:
    """Whether it does by its defaults, or by other settings."""
    return rotation_of(function, ()) is not None or rotation_of(function) is not None


def rotation_of(function: Any, settings: tuple[str, ...] | None = None) -> Rotation | None:
    """What a function turns, by trying it out; None where it does nothing of that kind.

    `settings` are the names of those arguments that may be others than their defaults, which are all if it is None.
    """
    if type(function) is not types.FunctionType or belongs_to_torch(function):
        return None
    found = _recognized(function, _settings_of(function) if settings is None else settings)
    return found if isinstance(found, Rotation) else None


def why_not_rotation(function: types.FunctionType) -> str:
    """For people."""
    found = _recognized(function, _settings_of(function))
    return "" if isinstance(found, Rotation) else found


@memoized
def _recognized(function: types.FunctionType, settings: tuple[str, ...]) -> Rotation | str:
    try:
        names, defaults = parameters_of(function)
        if len(names) - len(defaults) not in (2, 3, 4) or not all(map(is_setting, defaults.values())):
            return "takes something else than one or two heads, their tables, and settings that are numbers"
        found = _try_out(function, read_function(function, _NAMES), settings)
    except NotTriable as error:
        return str(error)
    return "turns nothing as ours does" if found is None else found


@in_a_thread_of_its_own
def _try_out(function: types.FunctionType, code: CodeSnapshot, varied: Sequence[str]) -> Rotation | None:
    names, defaults = parameters_of(function)
    rotation = Rotation(function, code)
    for other_arguments in _setting_values(defaults, varied):
        settings = settings_of(other_arguments)
        for convention in _conventions(len(names) - len(defaults), "view_as_complex" in names_in(function.__code__)):
            dtypes: SupportedDtypes | None = None
            trial = Trial(function, convention, other_arguments)
            for arrangement in _arrangements():
                for is_whole in (True, False):
                    if (
                        OperandKind(settings, arrangement.dims, (False,) * len(arrangement.lead), is_whole)
                        in rotation.forms
                    ):
                        continue
                    found = _form_of(trial, arrangement, is_whole)
                    if found is None:
                        continue
                    sizes = (16, 16 if is_whole else 8)
                    rotation.forms |= _broadcast_forms(trial, found, settings, arrangement, sizes)
                    if dtypes is None:
                        dtypes = dtypes_of(trial, found.form, arrangement, *sizes)
            if dtypes is not None:
                rotation.conventions[settings] = convention, dtypes
                break
    return rotation if any(dtypes for _, dtypes in rotation.conventions.values()) else None


def _broadcast_forms(
    trial: Trial, found: KnownForm, settings: Settings, arrangement: Arrangement, sizes: tuple[int, int]
) -> dict[OperandKind, KnownForm]:
    """The forms of one kind of operands, and of those like them that have ones among the tables' sizes."""
    is_whole = sizes[0] == sizes[1]
    forms = {}
    for ones in itertools.product((False, True), repeat=len(arrangement.lead)):
        beside = with_broadcast_dims(trial, found, arrangement, ones, *sizes)
        if beside is not None:
            forms[OperandKind(settings, arrangement.dims, ones, is_whole)] = beside
    return forms


def _conventions(required: int, may_be_complex: bool) -> Iterator[CallConvention]:
    """How so many arguments may be heads and tables."""
    heads = range(required - 2)
    if heads:
        yield CallConvention(len(heads), (*heads, required - 2, required - 1))
        yield CallConvention(len(heads), (*heads, required - 1, required - 2))
    if required < 4:
        for tables in ("cos, sin", "sin, cos", *(("complex",) if may_be_complex else ())):
            yield CallConvention(required - 1, tuple(range(required)), tables)


def _setting_values(defaults: dict[str, Any], varied: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """Values of the arguments that have defaults: as they are, and with one or two of those that may vary another.
    Numbers may be dimensions."""
    choices = [
        [v for v in _CHOICES.get(type(value), ()) if v != value and name in varied] for name, value in defaults.items()
    ]
    values = list(defaults.values())
    yield tuple(values)
    for count in (1, 2):
        for places in itertools.combinations(range(len(defaults)), count):
            for chosen in itertools.product(*(choices[place] for place in places)):
                instead = dict(zip(places, chosen, strict=True))
                yield tuple(instead.get(place, value) for place, value in enumerate(values))


def _arrangements() -> Iterator[Arrangement]:
    for dims in (4, 3):
        for lead in ((5,), (2, 5), (2, 5, 3)):
            for unsqueeze in (None, *range(len(lead) + 1)):
                if len(lead) + (unsqueeze is not None) < dims:
                    yield Arrangement(dims, lead, unsqueeze)


def _form_of(trial: Trial, arrangement: Arrangement, is_whole: bool) -> KnownForm | None:
    """The form in which the function turns heads that are arranged in that way."""
    sizes = ((8, 8), (12, 12), (32, 32)) if is_whole else ((16, 8), (24, 12), (32, 16))
    kinds = itertools.product(_TABLES, _LAYOUTS, _LAYOUTS, (False, True), (False, True))
    forms = [Form(arrangement.unsqueeze, *kind) for kind in kinds]
    for columns, entries in sizes:
        forms = trial.matching_forms(forms, trial.operands(arrangement, columns, entries))
        if not forms:
            return None
    is_partial = not is_whole and forms[0].table != "half"
    if not is_whole:
        # Whether it turns a part of longer heads, or does not take them.
        longer = trial.operands(arrangement, 40, 8)
        if trial.run(longer) is not None:
            forms, is_partial = trial.matching_forms(forms, longer), True
        elif is_partial:
            return None
    if not is_partial:
        # Where all columns turn, none of them are the last.
        forms = [form for form in forms if not form.at_end]
    if len(forms) != 1 or not has_same_gradients(trial, forms[0], trial.operands(arrangement, *sizes[0])):
        return None
    return (
        KnownForm(forms[0], is_partial) if holds_for_all(trial, forms[0], arrangement, is_whole, is_partial) else None
    )
