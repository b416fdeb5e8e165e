"""Replacements for functions of torch at their call sites, such as `F.layer_norm(x, ...)`.

A replacement has the signature of torch's function, and falls back to that function for arguments that ours does not
support. Arguments may be anything that users pass to torch, hence the type Any.
"""

import ast
import functools
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional
from torch import Tensor, nn

from ... import functional as ours
from ...functional.map_norm import map_norm
from ..code.code_objects import has_type
from ..operands import as_plain_tensor, is_called_plainly, is_operand, is_ordinary
from ..rotations.recognition import rotation_of, settings_in
from ..rules.activation_trials import TriedFunction, activation_function
from ..rules.channel_norms import are_running_statistics
from ..rules.gates import gate_of_function
from ..rules.norms import as_no_view, is_dense_map
from ..rules.pointwise import KEPT_BY_OUTPUT, ActivationRule, activated, has_halves, pointwise_of

# Torch's functions as they were when this package was imported: a user may patch them later.
theirs = types.SimpleNamespace(**vars(torch.nn.functional))
FUNCTION_TYPES = (types.FunctionType, types.BuiltinFunctionType)


def replacement_for(known: Any, call: ast.Call) -> tuple[Callable[..., Any], str] | None:
    """The function that replaces the callee of a call, and its description; None without a replacement.

    `known` is the module or function that the callee stood for during conversion.
    """
    if has_type(known, nn.Module) and isinstance(rule := pointwise_of(known)[0], ActivationRule):
        return _where_computed(functools.partial(_activation, known, rule), known), str(rule)
    if not has_type(known, FUNCTION_TYPES):
        return None
    if known in REPLACEMENTS:
        return _of_subclasses(REPLACEMENTS[known]), known.__name__
    if has_type(known, types.FunctionType) and (rotation := rotation_of(known, settings_in(call, known))) is not None:
        return _where_computed(rotation.of, known), "rotary"
    if (gate := gate_of_function(known)) is not None:
        return _where_computed(functools.partial(gate.of, nn.Module()), known), str(gate)
    tried = activation_function(known)
    if tried is not None and tried.result.name not in KEPT_BY_OUTPUT:
        return _where_computed(functools.partial(_tried_activation, tried), known), f"bias_act ({tried.result.name})"
    return None


def exchanging(known: Any, replacement: Callable[..., Any], is_local: bool = False) -> Callable[[Any], Any]:
    """A function that maps the callee `known` to its replacement, and any other callee to itself.

    `is_local`: the callee is a nested function, which a `def` makes anew at each call.
    """

    def is_instance(called: Any) -> bool:
        # A function that torch.compile traces has no such attributes.
        if not is_local or torch.compiler.is_compiling():
            return False
        is_plain = type(called) is types.FunctionType and called.__globals__ is known.__globals__
        is_plain = is_plain and called.__closure__ is called.__defaults__ is called.__kwdefaults__ is None
        return is_plain and called.__code__ == known.__code__

    return lambda called: replacement if called is known or is_instance(called) else called


def _where_computed(compute: Callable[[tuple, dict[str, Any]], Any], known: Any) -> Callable[..., Any]:
    """A function that computes by `compute`, and by the callee `known` where that returns None."""

    def call(*args: Any, **kwargs: Any) -> Any:
        output = compute(args, kwargs)
        return known(*args, **kwargs) if output is None else output

    return call


def _activation(module: nn.Module, rule: ActivationRule, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """The output of an activation module that is a global, so that conversion does not reach the module itself."""
    is_plain_call = len(args) == 1 and not kwargs and is_operand(args[0]) and is_called_plainly(module)
    return rule.apply(module, args[0]) if is_plain_call else None


def _tried_activation(tried: TriedFunction, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """The output of a function that computes an activation by a trial."""
    if len(args) != 1 or kwargs:
        return None
    input, kind = as_plain_tensor(args[0])
    name = tried.name_of(tried.function, input.dtype is torch.float64) if is_operand(input) else None
    operand = None if name is None else tried.result.operand(input)
    if name is None or operand is None:
        return None
    output = activated(operand, name)
    return output if kind is None else output.as_subclass(kind)


def _of_subclasses(replacement: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement for a function of torch, for tensors of trivial subclasses too."""

    def call(input: Any, *args: Any, **kwargs: Any) -> Any:
        plain, kind = as_plain_tensor(input)
        if kind is None:
            return replacement(input, *args, **kwargs)
        return replacement(plain, *args, **kwargs).as_subclass(kind)

    return call


def _are_operands(*tensors: Any) -> bool:
    return all(tensor is None or is_ordinary(tensor) for tensor in tensors)


@functools.wraps(theirs.layer_norm)
def layer_norm_of_rows(input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: Any = 1e-5) -> Any:
    function = ours.layer_norm if _is_row_norm(input, normalized_shape, weight, bias) else theirs.layer_norm
    return function(input, normalized_shape, weight, bias, eps)


@functools.wraps(theirs.layer_norm)
def _layer_norm(input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: Any = 1e-5) -> Any:
    if not _is_row_norm(input, normalized_shape, weight, bias):
        return theirs.layer_norm(input, normalized_shape, weight, bias, eps)
    if _is_moved_map(input, weight, bias) and len(normalized_shape) == 1:
        options = (eps, True, "identity", 0.0, False, True)
        return as_no_view(map_norm(input.movedim(-1, 1), weight, bias, options).movedim(1, -1))
    return ours.layer_norm(input, normalized_shape, weight, bias, eps)


def _is_moved_map(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether the rows are the pixels of a contiguous map on the CPU, which has a kernel, and not only the bias is
    trained."""
    if type(input) is not Tensor or not input.is_cpu or torch.compiler.is_compiling():
        return False
    if input.dim() < 3 or 1 in input.shape[1:] or input.is_contiguous() or not input.movedim(-1, 1).is_contiguous():
        return False
    is_trained = input.requires_grad or (weight is not None and weight.requires_grad)
    return is_trained or bias is None or not bias.requires_grad


@functools.wraps(theirs.rms_norm)
def _rms_norm(input: Any, normalized_shape: Any, weight: Any = None, eps: Any = None) -> Any:
    # Torch's output may have the strides of a non-contiguous input; ours is contiguous.
    if not _is_row_norm(input, normalized_shape, weight) or not input.is_contiguous():
        return theirs.rms_norm(input, normalized_shape, weight, eps)
    # On the CPU torch saves no 16-bit input, nor one that needs no gradient: the user may write to these in place.
    if not input.is_cuda and torch.is_grad_enabled() and (input.dtype.itemsize < 4 or not input.requires_grad):
        input = input.clone()
    return ours.rms_norm(input, normalized_shape, weight, eps)


def _is_row_norm(input: Any, normalized_shape: Any, *coefficients: Any) -> bool:
    if not is_operand(input) or not _are_operands(*coefficients) or not isinstance(normalized_shape, tuple | list):
        return False
    shape = tuple(normalized_shape)
    fits = bool(shape) and input.shape[-len(shape) :] == shape and 0 not in shape
    # Torch decides about mixed dtypes.
    return fits and all(c is None or (c.shape == shape and c.dtype == input.dtype) for c in coefficients)


@functools.wraps(theirs.group_norm)
def _group_norm(input: Any, num_groups: Any, weight: Any = None, bias: Any = None, eps: Any = 1e-5) -> Any:
    fits = is_operand(input) and _are_operands(weight, bias) and input.dim() > 2 and _same_dtype(input, weight, bias)
    fits = (
        fits and type(num_groups) is int and num_groups > 0 and input.shape[1] % num_groups == 0 and is_dense_map(input)
    )
    fits = fits and input.numel() != num_groups
    function = ours.group_norm if fits else theirs.group_norm
    return function(input, num_groups, weight, bias, eps)


@functools.wraps(theirs.batch_norm)
def _batch_norm(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: Any = False,
    momentum: Any = 0.1,
    eps: Any = 1e-5,
) -> Any:
    statistics = (running_mean, running_var)
    fits = is_operand(input) and _are_operands(weight, bias, *statistics) and input.dim() > 1
    fits = fits and _same_dtype(input, weight, bias) and type(training) is bool and type(momentum) in (float, int)
    fits = fits and (training or running_mean is not None) and input.numel() > input.shape[1]
    fits = fits and (running_mean is None) == (running_var is None) and _same_dtype(input, *statistics)
    fits = fits and (running_mean is None or are_running_statistics(running_mean, running_var, input.shape[1]))
    function = ours.batch_norm if fits else theirs.batch_norm
    return function(input, *statistics, weight, bias, training, momentum, eps)


def _same_dtype(input: Tensor, *coefficients: Tensor | None) -> bool:
    return all(c is None or c.dtype == input.dtype for c in coefficients)


@functools.wraps(theirs.glu)
def _glu(input: Any, dim: Any = -1) -> Any:
    fits = is_operand(input) and has_halves(input, dim)
    return ours.packed_glu(input, activation="sigmoid", layout="value_first") if fits else theirs.glu(input, dim)


@functools.wraps(theirs.dropout)
def _dropout(input: Any, p: Any = 0.5, training: Any = True, inplace: Any = False) -> Any:
    fits = type(p) is float and 0.0 < p <= 1.0 and training is True and inplace is False and is_operand(input)
    return ours.bias_act(input, dropout_p=p) if fits else theirs.dropout(input, p, training, inplace)


@functools.wraps(theirs.gelu)
def _gelu(input: Any, *, approximate: Any = "none") -> Any:
    name = {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate) if type(approximate) is str else None
    if name is None or not is_operand(input):
        return theirs.gelu(input, approximate=approximate)
    return activated(input, name)


@functools.wraps(theirs.silu)
def _silu(input: Any, inplace: Any = False) -> Any:
    if inplace is not False or not is_operand(input):
        return theirs.silu(input, inplace)
    return activated(input, "silu")


def _without_flag(replacement: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement for a function of torch that takes a sixth argument, with which the function itself runs."""

    def call(*args: Any, **kwargs: Any) -> Any:
        has_flag = len(args) > 5 or any(name.startswith("cudnn") for name in kwargs)
        return (function if has_flag else replacement)(*args, **kwargs)

    return call


NORMS: dict[Callable[..., Any], Callable[..., Any]] = {
    theirs.layer_norm: _layer_norm,
    theirs.rms_norm: _rms_norm,
    theirs.group_norm: _group_norm,
    torch.layer_norm: _without_flag(_layer_norm, torch.layer_norm),
    torch.rms_norm: _rms_norm,
    torch.group_norm: _without_flag(_group_norm, torch.group_norm),
    theirs.batch_norm: _batch_norm,
}
REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {
    **NORMS,
    theirs.glu: _glu,
    theirs.dropout: _dropout,
    theirs.gelu: _gelu,
    theirs.silu: _silu,
}
