"""Recognises the activation that a module or function computes, by a trial.

Values and derivative are compared with those of the known activations in float64, where different formulas for the same
activation agree.
"""

import functools
import inspect
import math
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from ... import recompute
from ...activations import NAMES
from ...backends.reference import ACTIVATIONS
from ..attribute_loads import loads_plainly, plain_loads
from ..code.call_graph import belongs_to_torch
from ..code.code_objects import has_type
from ..code.memoization import memoized, memoized_for_good
from ..code.reachability import CodeReader, depends_on_dtype, depends_on_shapes, is_unchanged
from ..code.settings import Settings, bare_module
from ..code.snapshots import CodeSnapshot, NotTriable, has_finalizer
from ..wrappers import original_method
from .trial import (
    POINTWISE,
    Outline,
    count_apart,
    in_own_thread,
    recording_saved_storages,
    result_of,
    takes_one_argument,
)


class TrialResult(NamedTuple):
    """The result of the trial of a module or function.

    Attributes:
        name: the activation; None where no activation matches.
        keeps_input: whether torch saves the input for backward.
        is_exact: whether the formula is exact; one with rounded constants differs from the activation in float64.
        keeps_others: whether torch saves two tensors or more that are neither the input nor the output.
    """

    name: str | None = None
    keeps_input: bool = True
    is_exact: bool = True
    keeps_others: bool = False

    def operand(self, input: Tensor) -> Tensor | None:
        """The input, or a copy if torch does not save the input, to which the model may write later; None where torch
        saves no more than the copy."""
        if self.keeps_input or not (torch.is_grad_enabled() and input.requires_grad):
            return input
        return recompute.copied(input) if self.keeps_others else None


@memoized_for_good
@in_own_thread
def activation_of_module(outline: Outline) -> TrialResult:
    """The activation that the module with this outline computes."""
    forward = functools.partial(outline.forward, outline.stand_in(torch.float64))
    holders = (holder for holder, _, _ in outline.code.dependencies)
    has_function = any(has_type(holder, type) and issubclass(holder, torch.autograd.Function) for holder in holders)
    return tried_activation(forward, has_function)


class TriedFunction(NamedTuple):
    """A function, the result of its trial, and all code and globals that the function reaches."""

    function: types.FunctionType
    result: TrialResult
    code: CodeSnapshot

    def name_of(self, called: Any, wide: bool = False) -> str | None:
        """The activation that a call of `called` computes now.

        None for another function, for a function that has changed since the trial, and for a formula that is not exact
        where operands are `wide`, which is float64.
        """
        holds = called is self.function and (self.result.is_exact or not wide)
        return self.result.name if holds and self.code.is_same() else None


class TriedMethod(NamedTuple):
    """A method `name` of a class, the settings of the module that the method reads, the result of its trial, and all
    code and globals that the method reaches."""

    kind: type[nn.Module]
    name: str
    settings: Settings
    result: TrialResult
    code: CodeSnapshot

    def name_of(self, called: Any, wide: bool = False) -> str | None:
        """The activation that a call of the bound method computes now; None as for a function.

        A compiler traces the method itself.
        """
        if type(called) is not types.MethodType or torch.compiler.is_compiling() or (wide and not self.result.is_exact):
            return None
        module: Any = called.__self__
        holds = original_method(called.__func__) is getattr(self.kind, self.name, None)
        return self.result.name if holds and is_unchanged(module, self.settings, self.code) else None


def settings_of_method(module: nn.Module, name: str) -> Settings | None:
    """The settings that a method of one tensor reads; None where the module's attribute is anything else, or the method
    must not be tried."""
    kind = type(module)
    method = inspect.getattr_static(kind, name, None)
    if type(method) is not types.FunctionType or belongs_to_torch(method) or not takes_one_argument(method):
        return None
    if name in module.__dict__ or has_finalizer(kind) or not loads_plainly(kind):
        return None
    try:
        reader = _read(module, method)
    except NotTriable:
        return None
    return tuple(sorted(reader.settings.items())) if loads_plainly(kind, *reader.settings) else None


def _read(module: nn.Module, function: types.FunctionType) -> CodeReader:
    reader = CodeReader(module)
    reader.read_function(function)
    if depends_on_shapes(reader) or depends_on_dtype(reader):
        raise NotTriable("decides by the shape or the dtype of its input")
    reader.read_modules()
    return reader


@memoized
def activation_method(kind: type[nn.Module], name: str, settings: Settings) -> TriedMethod | None:
    """The trial of a method that computes a known activation, with a stand-in; None for any other method."""
    module = bare_module(kind, settings)
    method = getattr(kind, name)
    try:
        reader = _read(module, method)
        result = tried_activation(functools.partial(method, module))
    except NotTriable:
        return None
    code = reader.snapshot([*plain_loads(kind), (kind, name, method)])
    return None if result.name is None else TriedMethod(kind, name, settings, result, code)


def is_importable(function: Any) -> TypeGuard[types.FunctionType]:
    """Whether a value is a function outside torch that can be imported under its name, so that it can be pickled."""
    if type(function) is not types.FunctionType or belongs_to_torch(function):
        return False
    return getattr(sys.modules.get(function.__module__), function.__name__, None) is function


@memoized
def activation_function(value: Any) -> TriedFunction | None:
    """The trial of a function that computes a known activation; None for any other value."""
    if not is_importable(value) or not takes_one_argument(value, 0):
        return None
    try:
        reader = _read(nn.Module(), value)
        result = tried_activation(value)
    except NotTriable:
        return None
    return None if result.name is None else TriedFunction(value, result, reader.snapshot())


@in_own_thread
def tried_activation(function: Callable[[Tensor], Any], has_function: bool = False) -> TrialResult:
    """The activation that code computes which may be anything: the trial ends at an operation that is not allowed."""

    def compute(points: Tensor) -> Tensor:
        return result_of(function, points, POINTWISE)

    transposed = torch.ones(2, 3, dtype=torch.float64, device="cpu").t()
    if compute(transposed).stride() != transposed.stride():
        return TrialResult()
    return activation_by_trial(compute, has_function)


def activation_by_trial(compute: Callable[[Tensor], Tensor], has_function: bool = False) -> TrialResult:
    """The activation that equals a function of one tensor in values and derivative. Callers run in their own thread.

    With `has_function` the gradient comes from an `autograd.Function` whose code was read, and must be linear in the
    incoming one: the derivative times the incoming gradient, and nothing else.
    """
    with recording_saved_storages() as saved:
        points = sample_points()
        input = points.clone().requires_grad_()
        values = compute(input)
        if type(values) is not Tensor or values.shape != points.shape or values.dtype != points.dtype:
            return TrialResult()
        if not values.requires_grad or input._version or not torch.equal(input, points):
            return TrialResult()
        if not _is_gradient_linear(values, input) if has_function else contains_function(values):
            return TrialResult()
        of_input, of_output = (tensor.untyped_storage()._cdata for tensor in (input, values))
        keeps_input, others = of_input in saved, saved - {of_input, of_output}
        (slopes,) = torch.autograd.grad(values.sum(), input)
        for name in NAMES:
            other = points.clone().requires_grad_()
            expected = ACTIVATIONS[name](other)
            (expected_slopes,) = torch.autograd.grad(expected.sum(), other)
            # Formulas with rounded constants differ by less than a rounding in float32. Derivatives may differ at one
            # point: at 0, where relu has a kink.
            if not count_apart(values, expected, 1e-7) and count_apart(slopes, expected_slopes, 1e-6) <= 1:
                # Exact formulas differ by 25 roundings in float64 at most.
                is_exact = not count_apart(values, expected, 1e-14) and count_apart(slopes, expected_slopes, 1e-14) <= 1
                return TrialResult(name, keeps_input, is_exact, len(others) > 1)
    return TrialResult()


def _is_gradient_linear(values: Tensor, input: Tensor) -> bool:
    """Whether the gradient is a constant factor times the incoming gradient, for both signs, small and large."""

    def gradient(incoming: Tensor) -> Tensor:
        return torch.autograd.grad(values, input, incoming, retain_graph=True)[0]

    slopes = result_of(gradient, torch.ones_like(values), POINTWISE)
    scales = torch.logspace(-6, 6, len(values), dtype=values.dtype, device=values.device)
    return all(
        torch.allclose(result_of(gradient, incoming, POINTWISE), incoming * slopes, rtol=1e-9, atol=0)
        for incoming in (scales, -scales, scales.flip(0))
    )


def sample_points() -> Tensor:
    """The points where activations are compared: dense near 0, where they bend, and up to the range of float32, where
    clamps show."""
    near = torch.linspace(-12, 12, 2403, dtype=torch.float64, device="cpu")
    far = torch.logspace(math.log10(12), 38, 1536, dtype=torch.float64, device="cpu")
    return torch.cat((-far.flip(0), near, far))


def contains_function(values: Tensor) -> bool:
    """Whether a user's autograd.Function, whose gradient may be anything, is in the autograd graph of the values."""
    waiting, seen = [values.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return True
        seen.add(node)
        waiting += [next_node for next_node, _ in node.next_functions]
    return False
