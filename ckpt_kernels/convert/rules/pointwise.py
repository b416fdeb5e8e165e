"""Recognises activations, dropouts and gates, and the rules for them.

torch.nn's own are recognised by their class, any other module without parameters and children by a trial (see
`activation_trials`).
"""

import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ... import functional as F
from ... import recompute
from ...activations import FUNCTIONS, name_of
from ..attribute_loads import LOADS_PLAINLY, is_set, loads_plainly, only_instances_define
from ..code.code_objects import has_type
from ..code.reachability import is_unchanged
from ..code.settings import Settings
from ..code.snapshots import CodeSnapshot, NotTriable
from ..module_tree import children_of, tensors_of
from ..native_guards import MISSING, ActivationGuard, Binding, ModuleGuard
from ..operands import CALLS_FORWARD, FORWARDS, HOOKS, has_forward_of, is_called_plainly
from ..swap import is_patched, original_of, rule_of
from .activation_trials import TrialResult, activation_of_module
from .likeness import has_name_of_norm_or_activation, looks_like_activation
from .rule import Rule, UnaryRule
from .trial import outline_of, takes_one_argument

# The attributes that the forwards of torch's activations, dropouts and gates read.
_SETTINGS = (
    *("alpha", "approximate", "beta", "dim", "inplace", "max_val", "min_val", "negative_slope", "p", "threshold"),
    "training",
)
# Activations whose gradient needs only the output, which the next layer saves too: converting them saves no memory.
KEPT_BY_OUTPUT = ("identity", "relu", "leaky_relu", "sigmoid", "tanh")
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)


def activated(input: Tensor, name: str) -> Tensor:
    """The activation of a tensor. A float32 copy of a 16-bit tensor is kept in 16 bits."""
    if not recompute.is_widened(input):
        return F.bias_act(input, activation=name)
    with recompute.keeping_narrow():
        return F.bias_act(input, activation=name)


@dataclass(frozen=True)
class ActivationRule(UnaryRule):
    """The rule for modules that compute an activation, as long as settings and code are those of the trial, and the
    parameters named `absent` are None as there."""

    trial: TrialResult
    settings: Settings
    code: CodeSnapshot | None
    absent: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.trial.name or ""

    def holds(self, module: nn.Module, wide: bool = False) -> bool:
        """Whether the module still computes the activation; `wide` asks for operands in float64."""
        if any(getattr(module, name, MISSING) is not None for name in self.absent):
            return False
        return (self.trial.is_exact or not wide) and is_unchanged(module, self.settings, self.code)

    def apply(self, module: nn.Module, input: Tensor) -> Tensor | None:
        operand = self.trial.operand(input) if self.holds(module, input.dtype == torch.float64) else None
        return None if operand is None else activated(operand, self.name)

    def activation_guard(self, bindings: tuple[Binding, ...]) -> ActivationGuard | None:
        if self.absent:
            return None
        same = bindings if self.code is None else (*bindings, *self.code.dependencies)
        # The guard names the forward, because a subclass may have another one.
        (_, name, forward), *_ = bindings
        absent = ("forward",) if self.code is None else ("forward", *self.code.helpers)
        guard = ModuleGuard(nn.Module, ((name, forward), *CALLS_FORWARD), same, (), HOOKS, absent)
        return ActivationGuard(guard, self.settings, self.name)

    def __str__(self) -> str:
        is_computed_alone = self.trial.keeps_input or self.trial.keeps_others
        return f"bias_act ({self.name}){'' if is_computed_alone else ' where it is fused, and without gradients'}"


@dataclass(frozen=True)
class DropoutRule(UnaryRule):
    """The rule for `torch.nn.Dropout`, which keeps no mask. The random numbers differ from those of torch's dropout."""

    description = "bias_act (dropout)"

    def apply(self, module: Any, input: Tensor) -> Tensor | None:
        p = probability_of(module)
        if module.inplace is not False or module.training is not True or not p:
            return None
        return F.bias_act(input, dropout_p=p)


@dataclass(frozen=True)
class GLURule(UnaryRule):
    """The rule for `torch.nn.GLU` over the last dimension."""

    description = "packed_glu (sigmoid)"

    def apply(self, module: nn.Module, input: Tensor) -> Tensor | None:
        if not has_halves(input, module.dim):
            return None
        return F.packed_glu(input, activation="sigmoid", layout="value_first")


def probability_of(module: Any) -> float | None:
    """The probability of a dropout module; None for anything but a number from 0 to 1."""
    return float(module.p) if type(module.p) in (float, int) and 0 <= module.p <= 1 else None


def has_halves(input: Tensor, dim: Any) -> bool:
    """Whether the dimension is the last one and can be halved."""
    return input.dim() > 0 and type(dim) is int and dim in (-1, input.dim() - 1) and input.shape[-1] % 2 == 0


def pointwise_of(module: nn.Module, name: str = "") -> tuple[Rule | None, str]:
    """The rule for an activation, a dropout or a gate, and ""; or None, and a reason if the module looks like one, or
    has been tried and has the name of one in the model."""
    if _is_torchs(module, nn.Dropout):
        return (DropoutRule() if probability_of(module) and module.inplace is False else None), ""
    if _is_torchs(module, nn.GLU):
        last = type(module.dim) is int and module.dim == -1
        return (GLURule(), "") if last else (None, "halves another dimension than the last")
    if is_set(module, "inplace"):
        # Converted only within a call site that has just computed the input: see `activation_of`.
        unknown = name_of(module) is None and looks_like_activation(module)
        return None, _why_none(module) if unknown else ""
    is_like_one = looks_like_activation(module) or (has_name_of_norm_or_activation(name) and _is_tried(module))
    try:
        trial, settings, code, absent = _named(module)
    except NotTriable as error:
        return None, str(error) if is_like_one else ""
    if trial.name is None:
        return None, _why_none(module) if is_like_one else ""
    return (None if trial.name in KEPT_BY_OUTPUT else ActivationRule(trial, settings, code, absent)), ""


def _why_none(module: nn.Module) -> str:
    if any(True for _ in tensors_of(module)):
        return "has parameters, which none of our activations has"
    if type(module).forward is nn.Module.forward or not takes_one_argument(type(module).forward):
        return "takes more than one tensor, and its code matches no known pattern"
    numbers = {name: value for name, value in vars(module).items() if type(value) in (int, float) and name[0] != "_"}
    settings = ", ".join(f"{name}={value:g}" for name, value in numbers.items())
    return "computes none of our activations" + (f" with {settings}" if settings else "")


def activation_of(act: Any, made: bool = False, wide: bool = False) -> str | None:
    """The name of the activation that a call of a module or function computes now.

    None where the call computes anything else or anything more, and for a formula that is not exact where operands are
    `wide`, which is float64. An in-place activation counts only where the caller has `made` the input just before, and
    nothing else reads the input.
    """
    if has_type(act, _FUNCTIONS):
        return FUNCTIONS.get(act)
    if not has_type(act, nn.Module) or not is_called_plainly(act) or (not made and is_set(act, "inplace")):
        return None
    rule = rule_of(act)
    if type(rule) is ActivationRule:
        return rule.name if rule.holds(act, wide) and not is_patched(type(act)) else None
    if rule is not None or not _is_torchs(act):
        return None
    return name_of(act)


def _guard_of_torchs(kind: type[nn.Module], name: str) -> ActivationGuard:
    forward, code = FORWARDS.get(kind, (None, None))
    attributes = (("forward", forward), *CALLS_FORWARD, *LOADS_PLAINLY)
    guard = ModuleGuard(kind, attributes, ((kind.forward, "__code__", code),), _SETTINGS, HOOKS, ("forward",))
    return ActivationGuard(guard, (), name)


_UNCONVERTED = ((nn.ReLU, "relu"), (nn.Sigmoid, "sigmoid"), (nn.Tanh, "tanh"))
# The activations that the native guards recognise: functions, and the classes of torch that are not converted.
NATIVE_ACTIVATIONS: tuple[tuple[Any, str | ActivationGuard], ...] = (
    *FUNCTIONS.items(),
    *((kind, _guard_of_torchs(kind, name)) for kind, name in _UNCONVERTED),
)


def _is_torchs(module: nn.Module, kind: type[nn.Module] | None = None) -> bool:
    """Whether the module's very class is one of torch's, or `kind`, with torch's forward and plain attributes."""
    original = original_of(module)
    if (kind is not None and original is not kind) or not has_forward_of(original, original):
        return False
    return only_instances_define(original, *_SETTINGS) or loads_plainly(original, *_SETTINGS)


def is_unmodified_torch(module: nn.Module, *names: str) -> bool:
    """Whether the module's very class is one of torch's, with torch's forward, and loads these attributes plainly."""
    return _is_torchs(module) and loads_plainly(original_of(module), *names)


def _named(module: nn.Module) -> tuple[TrialResult, Settings, CodeSnapshot | None, tuple[str, ...]]:
    """The activation by the module's class or by a trial, and the settings, the code and the parameters of None that
    this depends on."""
    if _is_torchs(module):
        name = name_of(module)
        if name is None:
            return TrialResult(), (), None, ()
        plain = {k: v for k, v in vars(module).items() if type(v) in (bool, int, float, str) and k != "training"}
        return TrialResult(name), tuple(sorted(plain.items())), None, ()
    if not _is_tried(module):
        return TrialResult(), (), None, ()
    outline = outline_of(module, gradients=True)
    return activation_of_module(outline), outline.settings, outline.code, tuple(module._parameters)


def _is_tried(module: nn.Module) -> bool:
    """Whether a module is tried: one without tensors and children, and not torch's own, that takes one argument."""
    forward = type(module).forward
    is_leaf = not any(True for _ in tensors_of(module)) and not children_of(module)
    return is_leaf and not _is_torchs(module) and takes_one_argument(forward) and forward is not nn.Module.forward
