"""Recognition of rotations: tries a function on small random tensors, and compares results and gradients.

The outcome is a `forms.Rotation`.
"""

import ast
import itertools
import types
from collections.abc import Iterator, Sequence
from typing import Any

from ..code.call_graph import belongs_to_torch
from ..code.code_objects import names_in
from ..code.function_reachability import read_function
from ..code.memoization import memoized
from ..code.snapshots import CodeSnapshot, NotTriable
from ..rules.trial import in_own_thread
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

# The attributes of tensors and of torch that a rotation may name.
_NAMES = frozenset(
    """Tensor cat chunk device dtype empty_like flatten float neg repeat_interleave reshape shape size stack to torch
    transpose type_as unbind unflatten unsqueeze view view_as_complex view_as_real""".split()
)
_TABLES = ("full", "half", "first half", "neighbours")
_LAYOUTS = ("halves", "interleaved")
# Other values of settings that trials use: for integers, dimensions where tables may be unsqueezed.
_CHOICES: dict[type, tuple[Any, ...]] = {int: (-2, -1, 0, 1, 2), bool: (False, True)}


def settings_in(call: ast.Call, function: types.FunctionType) -> tuple[str, ...]:
    """The names of the settings that a call passes, or may pass."""
    if any(isinstance(argument, ast.Starred) for argument in call.args) or None in [k.arg for k in call.keywords]:
        return _settings_of(function)
    passed = {*function.__code__.co_varnames[: len(call.args)], *(keyword.arg for keyword in call.keywords)}
    return tuple(name for name in _settings_of(function) if name in passed)


def _settings_of(function: types.FunctionType) -> tuple[str, ...]:
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return names[len(names) - len(function.__defaults__ or ()) :]


def is_rotation(function: Any) -> bool:
    """Whether a function is a rotation with its defaults, or with other settings."""
    return rotation_of(function, ()) is not None or rotation_of(function) is not None


def rotation_of(function: Any, settings: tuple[str, ...] | None = None) -> Rotation | None:
    """The rotation that trials recognize, or None if the function is not a rotation.

    `settings` are the names of the arguments that trials vary from their defaults; None stands for all with a default.
    """
    if type(function) is not types.FunctionType or belongs_to_torch(function):
        return None
    outcome = _recognized(function, _settings_of(function) if settings is None else settings)
    return outcome if isinstance(outcome, Rotation) else None


def why_not_rotation(function: types.FunctionType) -> str:
    """The reason, for people, why a function is no rotation; "" if it is one."""
    outcome = _recognized(function, _settings_of(function))
    return "" if isinstance(outcome, Rotation) else outcome


@memoized
def _recognized(function: types.FunctionType, settings: tuple[str, ...]) -> Rotation | str:
    """The rotation, or why the function is none."""
    try:
        names, defaults = parameters_of(function)
        if len(names) - len(defaults) not in (2, 3, 4) or not all(map(is_setting, defaults.values())):
            return "takes something else than one or two heads, their tables, and settings that are numbers"
        rotation = _try_out(function, len(names) - len(defaults), read_function(function, _NAMES), settings)
    except NotTriable as error:
        return str(error)
    return "rotates in no way that the rotary op supports" if rotation is None else rotation


@in_own_thread
def _try_out(function: types.FunctionType, required: int, code: CodeSnapshot, varied: Sequence[str]) -> Rotation | None:
    rotation = Rotation(function, code)
    for values in _setting_values(rotation.defaults, varied):
        settings = settings_of(values)
        for convention in _conventions(required, "view_as_complex" in names_in(function.__code__)):
            dtypes = _add_forms(rotation, Trial(function, convention, values), settings)
            if dtypes is not None:
                rotation.conventions[settings] = convention, dtypes
                break
    return rotation if any(dtypes for _, dtypes in rotation.conventions.values()) else None


def _add_forms(rotation: Rotation, trial: Trial, settings: Settings) -> SupportedDtypes | None:
    """Add the forms that a trial shows to the rotation; returns the dtypes that the first of them supports."""
    dtypes: SupportedDtypes | None = None
    for arrangement, is_whole in itertools.product(_arrangements(), (True, False)):
        no_ones = (False,) * len(arrangement.lead)
        if OperandKind(settings, arrangement.dims, no_ones, is_whole) in rotation.forms:
            continue
        known = _form_of(trial, arrangement, is_whole)
        if known is None:
            continue
        sizes = (16, 16 if is_whole else 8)
        for ones in itertools.product((False, True), repeat=len(arrangement.lead)):
            form = with_broadcast_dims(trial, known, arrangement, ones, *sizes)
            if form is not None:
                rotation.forms[OperandKind(settings, arrangement.dims, ones, is_whole)] = form
        if dtypes is None:
            dtypes = dtypes_of(trial, known.form, arrangement, *sizes)
    return dtypes


def _conventions(required: int, may_be_complex: bool) -> Iterator[CallConvention]:
    """The ways in which so many required arguments may be heads and tables."""
    heads = range(required - 2)
    if heads:
        yield CallConvention(len(heads), (*heads, required - 2, required - 1))
        yield CallConvention(len(heads), (*heads, required - 1, required - 2))
    if required < 4:
        for tables in ("cos, sin", "sin, cos", *(("complex",) if may_be_complex else ())):
            yield CallConvention(required - 1, tuple(range(required)), tables)


def _setting_values(defaults: dict[str, Any], varied: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """Values of the settings: the defaults, and then other values for one or two of the `varied` settings."""
    choices = [
        [v for v in _CHOICES.get(type(value), ()) if v != value and name in varied] for name, value in defaults.items()
    ]
    values = list(defaults.values())
    yield tuple(values)
    for count in (1, 2):
        for places in itertools.combinations(range(len(defaults)), count):
            for chosen in itertools.product(*(choices[place] for place in places)):
                changed = dict(zip(places, chosen, strict=True))
                yield tuple(changed.get(place, value) for place, value in enumerate(values))


def _arrangements() -> Iterator[Arrangement]:
    """The arrangements that trials cover."""
    for dims in (4, 3):
        for lead in ((5,), (2, 5), (2, 5, 3)):
            for unsqueeze in (None, *range(len(lead) + 1)):
                if len(lead) + (unsqueeze is not None) < dims:
                    yield Arrangement(dims, lead, unsqueeze)


def _form_of(trial: Trial, arrangement: Arrangement, is_whole: bool) -> KnownForm | None:
    """The one form by which the function rotates heads in an arrangement, None without one.

    `is_whole`: whether tables have as many columns as heads.
    """
    sizes = ((8, 8), (12, 12), (32, 32)) if is_whole else ((16, 8), (24, 12), (32, 16))
    kinds = itertools.product(_TABLES, _LAYOUTS, _LAYOUTS, (False, True), (False, True))
    forms = [Form(arrangement.unsqueeze, *kind) for kind in kinds]
    for columns, entries in sizes:
        forms = trial.matching_forms(forms, trial.operands(arrangement, columns, entries))
        if not forms:
            return None
    is_partial = not is_whole and forms[0].table != "half"
    if not is_whole:
        # The function may rotate a part of longer heads, or not take them.
        longer = trial.operands(arrangement, 40, 8)
        if trial.run(longer) is not None:
            forms, is_partial = trial.matching_forms(forms, longer), True
        elif is_partial:
            return None
    if not is_partial:
        # If all columns are rotated, both values of `at_end` mean the same.
        forms = [form for form in forms if not form.at_end]
    if len(forms) != 1 or not has_same_gradients(trial, forms[0], trial.operands(arrangement, *sizes[0])):
        return None
    holds = holds_for_all(trial, forms[0], arrangement, is_whole, is_partial)
    return KnownForm(forms[0], is_partial) if holds else None
