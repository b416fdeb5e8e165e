"""Gates of the two halves of a tensor in a method or a function of one tensor, such as `_apply_gate(gate_up)` of
GPT-OSS, which are recognised by a trial (see `gate_trials`)."""

import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from ... import recompute
from ...activations import FUNCTION_NAMES
from ...backends.reference import ACTIVATIONS
from ..attribute_loads import loads_plainly, only_instances_define, plain_loads
from ..code.call_graph import belongs_to_torch
from ..code.code_objects import names_in
from ..code.function_reachability import SizeIndependentReader
from ..code.memoization import memoized
from ..code.reachability import is_unchanged
from ..code.settings import Settings, bare_module
from ..code.snapshots import CodeSnapshot, NotTriable, has_finalizer
from ..operands import as_plain_tensor, has_global_hooks, is_operand
from .activation_trials import is_importable
from .gate_trials import GateTrial, gate_by_trial
from .pointwise import activation_of
from .trial import takes_one_argument

# The attributes of tensors, of torch and of modules that the code of a gate may name, beside activations.
_NAMES = FUNCTION_NAMES.union(
    """Tensor add chunk clamp clamp_max clamp_min div dtype erf float float32 functional math mul neg nn shape size
    split sqrt sub to torch type_as unbind unflatten""".split()
)
_LARGEST = 2**62
_TAKES_PARTS = frozenset(("chunk", "split", "unbind"))
# A clamp or a cast, which no pattern has, saves tensors of its own.
_CLAMPS_OR_CASTS = frozenset(("clamp", "clamp_max", "clamp_min", "float", "to", "type_as"))

# Names of children, and the activations that they compute.
Activations = tuple[tuple[str, str], ...]


class GateOutline(NamedTuple):
    """The parts of a module that a method reads."""

    settings: Settings
    activations: Activations


class TriedGate(NamedTuple):
    """A gate that a trial recognised, and all that it depends on."""

    trial: GateTrial
    outline: GateOutline
    code: CodeSnapshot

    def of(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The gate, by the fused function; None where the code of the model must compute the gate."""
        if len(args) != 1 or kwargs:
            return None
        input, kind = as_plain_tensor(args[0])
        output = self._of_operand(module, input) if is_operand(input) else None
        return output if output is None or kind is None else output.as_subclass(kind)

    def _of_operand(self, module: nn.Module, input: Tensor) -> Tensor | None:
        trial, (settings, activations) = self.trial, self.outline
        keeps_input = trial.keeps_input.get(input.dtype)
        if keeps_input is None or input.dim() not in trial.dims or input.shape[-1] % 2 or not input.is_contiguous():
            return None
        if not is_unchanged(module, settings, self.code) or (activations and has_global_hooks()):
            return None
        wide = input.dtype is torch.float64
        children = module._modules
        if any(activation_of(children.get(name), wide=wide) != activation for name, activation in activations):
            return None
        # The user may write in place to an input of which eager torch saves copies.
        is_copied = not keeps_input and torch.is_grad_enabled() and input.requires_grad
        return trial.form.compute(recompute.copied(input) if is_copied else input)

    def __str__(self) -> str:
        return f"packed gate ({self.trial.form})"


class _GateReader(SizeIndependentReader):
    """Reads code that may take halves of a tensor, call activations among the module's children, and name numbers."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, _NAMES)
        self.activations: dict[str, str] = {}
        self._constants: list[Any] = []

    @property
    def numbers(self) -> list[float]:
        """The numbers among constants, settings, globals and defaults."""
        bound = [value for _, _, value in self.dependencies]
        defaults = [number for value in bound if type(value) is tuple for number in value]
        values = [*self._constants, *self.settings.values(), *bound, *defaults]
        # No limit or offset is larger, and larger integers do not fit a float.
        return list(dict.fromkeys(v for v in values if type(v) in (int, float) and abs(v) <= _LARGEST))

    def check_constant(self, value: Any) -> None:
        self._constants.append(value)

    def read_attribute(self, name: str) -> None:
        if name in self.module._parameters:
            raise NotTriable("reads a parameter")
        child = self.module._modules.get(name)
        if child is None:
            super().read_attribute(name)
        elif (activation := child.name if type(child) is _Activation else activation_of(child)) is not None:
            self.names.add(name)
            self.activations[name] = activation
        else:
            raise NotTriable(f"calls {name}, which computes none of our activations")


class _Activation(nn.Module):
    """Stands for a child that computes an activation."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, input: Tensor) -> Tensor:
        return ACTIVATIONS[self.name](input)


def may_be_gate(function: Any, bound: int) -> TypeGuard[types.FunctionType]:
    """Whether a function takes one tensor, after so many bound arguments, and parts of a tensor."""
    if (
        type(function) is not types.FunctionType
        or belongs_to_torch(function)
        or not takes_one_argument(function, bound)
    ):
        return False
    names = names_in(function.__code__)
    return not _TAKES_PARTS.isdisjoint(names) or any(type(c) is slice or c is ... for c in function.__code__.co_consts)


def clamps_or_casts(function: types.FunctionType) -> bool:
    """Whether the code of a function may clamp or cast a tensor, which no pattern of expressions does."""
    return not _CLAMPS_OR_CASTS.isdisjoint(names_in(function.__code__))


def outline_of_method(module: nn.Module, method: types.FunctionType) -> GateOutline | None:
    """The parts of the module that a method reads; None if the method must not be tried, or is no gate."""
    result = _gate_or_reason(module, method)
    return None if isinstance(result, str) else result.outline


def why_no_gate(module: nn.Module) -> str:
    """Why a module whose forward takes parts of a tensor is no gate of ours; "" for any other module."""
    result = _gate_or_reason(module, type(module).forward)
    return result if isinstance(result, str) else ""


def _gate_or_reason(module: nn.Module, method: Any) -> TriedGate | str:
    """The gate that a method of the module computes, or why none; "" for a method that takes no parts of a tensor."""
    if not may_be_gate(method, 1):
        return ""
    try:
        return _tried_method(type(module), method, _outline(module, method))
    except NotTriable as error:
        return str(error)


def _outline(module: nn.Module, method: types.FunctionType) -> GateOutline:
    """The parts of the module that a method reads. Raises `NotTriable`."""
    kind = type(module)
    if has_finalizer(kind):
        raise NotTriable("has a finalizer, which a trial would run")
    reader = _read(module, method)
    if not loads_plainly(kind, *reader.settings) or not only_instances_define(kind, *reader.activations):
        raise NotTriable("loads its attributes by code of its class")
    return GateOutline(tuple(sorted(reader.settings.items())), tuple(sorted(reader.activations.items())))


def gate_of_method(kind: type[nn.Module], method: types.FunctionType, outline: GateOutline) -> TriedGate | None:
    """The gate that a method of modules of that class computes, by a trial with a stand-in."""
    result = _tried_method(kind, method, outline)
    return None if isinstance(result, str) else result


@memoized
def _tried_method(kind: type[nn.Module], method: types.FunctionType, outline: GateOutline) -> TriedGate | str:
    module = bare_module(kind, outline.settings)
    module._modules.update((child, _Activation(activation)) for child, activation in outline.activations)
    return _tried(module, method, functools.partial(method, module), outline)


@memoized
def gate_of_function(function: Any) -> TriedGate | None:
    """The gate that a function of a file computes; None for any other value."""
    if not may_be_gate(function, 0) or not is_importable(function):
        return None
    result = _tried(nn.Module(), function, function, GateOutline((), ()))
    return None if isinstance(result, str) else result


def _read(module: nn.Module, function: types.FunctionType) -> _GateReader:
    reader = _GateReader(module)
    reader.read_function(function)
    reader.read_modules()
    return reader


def _tried(
    module: nn.Module, read: types.FunctionType, compute: Callable[[Tensor], Tensor], outline: GateOutline
) -> TriedGate | str:
    """The gate that a method or a function computes, or why none."""
    try:
        reader = _read(module, read)
        trial = gate_by_trial(compute, reader.numbers)
    except NotTriable as error:
        return str(error)
    if trial is None:
        return "computes none of our gates"
    return TriedGate(trial, outline, reader.snapshot(plain_loads(type(module))))


def gated(gate: TriedGate, method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, computed by the fused function where the operand is of a kind that was tried."""

    def call(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        output = gate.of(module, args, kwargs)
        return method(module, *args, **kwargs) if output is None else output

    return call


def gate_at_site(gate: TriedGate) -> Callable[[nn.Module, Any], list[Any]]:
    """The function that a rewritten method calls in place of a run of statements, as in `templates.guarded_call`."""

    def call(module: nn.Module, packed: Any) -> list[Any]:
        output = gate.of(module, (packed,), {})
        return [False] if output is None else [output, True]

    return call
