"""The row-norm ops: what each keeps for backward, and how its gradients are asked for.

Every op takes tensors of any leading shape whose last dimensions, `columns` elements, are normalised, and makes
contiguous outputs. A tensor that a backward op returns for a gradient that is not wanted is empty.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends import reference
from .operands import (
    as_rows,
    coefficient_room,
    column_sum,
    contiguous,
    gradient_room,
    in_dtypes_of,
    or_none,
    returned,
    returned_fake,
    rows_as_they_lie,
    rows_or_none,
    statistics,
    vector,
    wanted_gradients,
    zero,
)
from .registration import Op
from .second_order import second_order
from .sharding import Sharding, dims_of_rows, last_of_input, like_input, seed


def _rows(columns_place: int) -> Callable[[Sequence[Any]], Collection[int]]:
    """Rows may be split, not what is normalised; `columns` is in that place of the arguments."""
    return lambda arguments: range(dims_of_rows(arguments[0].shape, arguments[columns_place]))


def _samples_of_input(tensor: Tensor, arguments: Sequence[Any]) -> Sequence[int | None]:
    """Of scale and shift, whose dimensions are the input's or 1 for all samples."""
    samples = dims_of_rows(tensor.shape, arguments[5])
    sizes = zip(tensor.shape, arguments[0].shape, strict=False)
    return [dim if dim < samples and size == whole else None for dim, (size, whole) in enumerate(sizes)]


# row_norm


def forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    columns: int,
    eps: float,
    centered: bool,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = statistics(input, columns, centered)
    output = _normalized(input, weight, bias, mean, rstd, columns, eps, centered, *options, False)
    return output, mean, without_slope(rstd, columns, centered)


def without_slope(rstd: Tensor, columns: int, centered: bool) -> Tensor:
    """rstd, or zeros in place of it where one element less its mean is 0 whatever it is.

    By these the backward pass finds gradients of 0, and not the rounding of what cancels out, which eps makes large.
    """
    return rstd.mul_(0) if centered and columns == 1 else rstd


def _normalized(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    columns: int,
    eps: float,
    centered: bool,
    *options: Any,
) -> Tensor:
    """The output. The last option says whether the statistics are there already, or are to be found."""
    output = contiguous(input)
    if output.numel():
        backends.select(input).row_norm_forward(
            rows_as_they_lie(input, columns),
            vector(weight),
            vector(bias),
            as_rows(output, columns),
            mean if centered else None,
            rstd,
            eps,
            *options,
        )
    return output


def _row_norm_fake(input, weight, bias, columns, eps, centered, *options):
    return contiguous(input), *statistics(input, columns, centered)


def _row_norm_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    input, weight, bias, *ctx.options = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    _, _, _, _, activation, _, _ = ctx.options
    ctx.bias_only = activation == "identity" and not any(wanted_gradients(ctx, 2))
    ctx.save_for_backward(*((None, None, bias, None, None) if ctx.bias_only else (input, weight, bias, mean, rstd)))


def _row_norm_recipe(ctx: Any, inputs: tuple, output: tuple) -> tuple | None:
    if ctx.bias_only:
        return None
    input, weight, bias, *options = inputs
    _, mean, rstd = output
    return lambda *tensors: _normalized(*tensors, *options, True), (input, weight, bias, mean, rstd)


def _row_norm_backward_rule(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple:
    input, weight, bias, mean, rstd = ctx.saved_tensors
    wanted, none = wanted_gradients(ctx, 3), (None,) * len(ctx.options)
    if grad_output is None:
        return None, None, None, *none
    if ctx.bias_only:
        return None, None, column_sum(grad_output, bias), *none
    found = row_norm_backward(grad_output, input, weight, bias, mean, rstd, *ctx.options, wanted)
    return *or_none(found, wanted), *none


def _row_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    gradients, _ = gradient(grad_output, input, weight, bias, *rest, False)
    return returned(gradients, (input, weight, bias), input)


def gradient(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    columns: int,
    eps: float,
    centered: bool,
    *options: Any,
) -> tuple[list[Tensor | None], Tensor | None]:
    """The gradients wanted, in the operands' dtypes, and the output again if asked for: the last two options."""
    *options, wanted, rewrite = options
    grad_input, output = gradient_room((input, input), (wanted[0], rewrite))
    grad_weight, grad_bias = coefficient_room((weight, bias), wanted[1:], input)
    if input.numel():
        backends.select(input).row_norm_backward(
            rows_as_they_lie(grad_output, columns),
            rows_as_they_lie(input, columns),
            vector(weight),
            vector(bias),
            mean if centered else None,
            rstd,
            rows_or_none(grad_input, columns),
            grad_weight,
            grad_bias,
            rows_or_none(output, columns),
            eps,
            *options,
        )
    else:
        zero(grad_weight, grad_bias)
    return in_dtypes_of((input, weight, bias), (grad_input, grad_weight, grad_bias)), output


def _row_norm_backward_fake(grad_output, input, weight, bias, mean, rstd, *options):
    return returned_fake((input, weight, bias), options[-1], input)


def _row_norm_composed(input, weight, bias, columns, *options):
    return (reference.row_norm(as_rows(input, columns), weight, bias, *options)[0].reshape(input.shape),)


def _row_norm_first_order(grad_output, input, weight, bias, mean, rstd, columns, *options):
    *options, wanted = options

    def block(input, weight, bias):
        return _row_norm_composed(input, weight, bias, columns, *options)

    return reference.gradients(block, (input, weight, bias), (grad_output,), wanted, create_graph=True)


_ROW_NORM_OPTIONS = (
    "SymInt columns, float eps, bool centered, str pre_activation, str activation, float weight_offset,"
    " bool cast_before_weight"
)
row_norm_backward = Op(
    "row_norm_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd,"
    f" {_ROW_NORM_OPTIONS}, bool[] wanted) -> (Tensor, Tensor, Tensor)",
    _row_norm_backward,
    _row_norm_backward_fake,
    *second_order(_row_norm_first_order, differentiable=4),
)
row_norm = Op(
    f"row_norm(Tensor input, Tensor? weight, Tensor? bias, {_ROW_NORM_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    forward,
    _row_norm_fake,
    _row_norm_setup,
    _row_norm_backward_rule,
    _row_norm_composed,
    results=1,
    recipe=_row_norm_recipe,
    sharding=Sharding(_rows(3), (like_input, last_of_input, last_of_input), (like_input,)),
)


# modulated_row_norm: a row norm whose weight and bias differ from sample to sample


def _modulated_coefficients(
    scale: Tensor, shift: Tensor, weight: Tensor | None, bias: Tensor | None, columns: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(x_hat * weight + bias) * (1 + scale) + shift, as one weight and one bias a sample."""
    factor = 1 + scale.to(dtype).reshape(-1, columns)
    offset = shift.to(dtype).reshape(-1, columns)
    if bias is not None:
        offset = offset + factor * bias.to(dtype).reshape(columns)
    if weight is not None:
        factor = factor * weight.to(dtype).reshape(columns)
    return factor, offset


def _modulated_row_norm(input, scale, shift, weight, bias, columns, eps, centered, pre_activation, activation):
    dtype = reference.compute_dtype(input.dtype)
    coefficients = _modulated_coefficients(scale, shift, weight, bias, columns, dtype)
    return forward(input, *coefficients, columns, eps, centered, pre_activation, activation, 0.0, False)


def _modulated_row_norm_fake(input, scale, shift, weight, bias, columns, eps, centered, *options):
    return contiguous(input), *statistics(input, columns, centered)


def _modulated_row_norm_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *operands, columns, eps, centered, pre_activation, activation = inputs
    ctx.options = (columns, eps, centered, pre_activation, activation)
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*operands, mean, rstd)


def _modulated_row_norm_recipe(ctx: Any, inputs: tuple, output: tuple) -> tuple:
    options = inputs[5:]
    return lambda *tensors: _modulated_row_norm(*tensors, *options)[0], inputs[:5]


def _modulated_row_norm_backward_rule(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple:
    wanted, none = wanted_gradients(ctx, 5), (None,) * len(ctx.options)
    if grad_output is None:
        return (None,) * 5 + none
    found = modulated_row_norm_backward(grad_output, *ctx.saved_tensors, *ctx.options, wanted)
    return *or_none(found, wanted), *none


def _modulated_row_norm_backward(
    grad_output, input, scale, shift, weight, bias, mean, rstd, columns, eps, centered, *options
):
    *options, wanted = options
    dtype = reference.compute_dtype(input.dtype)
    factor, offset = _modulated_coefficients(scale, shift, weight, bias, columns, dtype)
    need_factor = any(wanted[i] for i in (1, 3, 4))
    need_offset = any(wanted[i] for i in (1, 2, 4))
    grad_input, grad_factor, grad_offset = _row_norm_backward(
        grad_output,
        input,
        factor,
        offset,
        mean,
        rstd,
        columns,
        eps,
        centered,
        *options,
        0.0,
        False,
        [wanted[0], need_factor, need_offset],
    )
    grads: list[Tensor | None] = [grad_input if wanted[0] else None, None, None, None, None]
    if wanted[1]:
        grads[1] = grad_factor if weight is None else grad_factor * weight.to(dtype).reshape(columns)
        if bias is not None:
            grads[1] = grads[1] + grad_offset * bias.to(dtype).reshape(columns)
    if wanted[2]:
        grads[2] = grad_offset
    if wanted[3]:
        grads[3] = (grad_factor * (1 + scale.to(dtype).reshape(-1, columns))).sum(0)
    if wanted[4]:
        grads[4] = (grad_offset * (1 + scale.to(dtype).reshape(-1, columns))).sum(0)
    operands = (input, scale, shift, weight, bias)
    shaped = [None if g is None else g.reshape(t.shape) for g, t in zip(grads, operands, strict=True)]
    return returned(shaped, operands, input)


def _modulated_row_norm_backward_fake(grad_output, input, scale, shift, weight, bias, mean, rstd, *options):
    return returned_fake((input, scale, shift, weight, bias), options[-1], input)


def _modulated_row_norm_composed(input, scale, shift, weight, bias, columns, *options):
    dtype = reference.compute_dtype(input.dtype)
    coefficients = _modulated_coefficients(scale, shift, weight, bias, columns, dtype)
    return _row_norm_composed(input, *coefficients, columns, *options, 0.0, False)


def _modulated_row_norm_first_order(grad_output, input, scale, shift, weight, bias, mean, rstd, *options):
    *options, wanted = options

    def block(input, scale, shift, weight, bias):
        return _modulated_row_norm_composed(input, scale, shift, weight, bias, *options)

    operands = (input, scale, shift, weight, bias)
    return reference.gradients(block, operands, (grad_output,), wanted, create_graph=True)


_MODULATED_OPTIONS = "SymInt columns, float eps, bool centered, str pre_activation, str activation"
modulated_row_norm_backward = Op(
    "modulated_row_norm_backward(Tensor grad_output, Tensor input, Tensor scale, Tensor shift, Tensor? weight,"
    f" Tensor? bias, Tensor mean, Tensor rstd, {_MODULATED_OPTIONS}, bool[] wanted)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _modulated_row_norm_backward,
    _modulated_row_norm_backward_fake,
    *second_order(_modulated_row_norm_first_order, differentiable=6),
)
modulated_row_norm = Op(
    "modulated_row_norm(Tensor input, Tensor scale, Tensor shift, Tensor? weight, Tensor? bias,"
    f" {_MODULATED_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _modulated_row_norm,
    _modulated_row_norm_fake,
    _modulated_row_norm_setup,
    _modulated_row_norm_backward_rule,
    _modulated_row_norm_composed,
    results=1,
    recipe=_modulated_row_norm_recipe,
    sharding=Sharding(
        _rows(5), (like_input, _samples_of_input, _samples_of_input, last_of_input, last_of_input), (like_input,)
    ),
)


# add_row_norm


def _add_row_norm(input, residual, weight, bias, seed, columns, eps, centered, *options):
    output, residual_out = contiguous(input), contiguous(input)
    mean, rstd = statistics(input, columns, centered)
    if output.numel():
        backends.select(input).add_row_norm_forward(
            rows_as_they_lie(input, columns),
            rows_as_they_lie(residual, columns),
            vector(weight),
            vector(bias),
            seed,
            as_rows(output, columns),
            as_rows(residual_out, columns),
            mean if centered else None,
            rstd,
            eps,
            *options,
        )
    return output, residual_out, mean, without_slope(rstd, columns, centered)


def _add_row_norm_fake(input, residual, weight, bias, seed, columns, eps, centered, *options):
    return contiguous(input), contiguous(input), *statistics(input, columns, centered)


def _add_row_norm_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    input, residual, weight, bias, seed, *ctx.options = inputs
    _, residual_out, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(residual_out, weight, bias, seed, mean, rstd)


def _add_row_norm_recipe(ctx: Any, inputs: tuple, output: tuple) -> tuple:
    """The norm of residual_out, which is kept."""
    _, _, weight, bias, _, columns, eps, centered, *options, _ = inputs
    _, residual_out, mean, rstd = output

    def rebuild(*tensors: Tensor | None) -> Tensor:
        return _normalized(*tensors, columns, eps, centered, "identity", *options, True)

    return rebuild, (residual_out, weight, bias, mean, rstd)


def _add_row_norm_backward_rule(
    ctx: Any, grad_output: Tensor | None, grad_residual_out: Tensor | None, *_: None
) -> tuple:
    residual_out, weight, bias, seed, mean, rstd = ctx.saved_tensors
    wanted, none = wanted_gradients(ctx, 4), (None,) * (len(ctx.options) + 1)
    if grad_output is None:
        if grad_residual_out is None:
            return (None,) * 4 + none
        # Nobody has read the norm, whose weights then have no gradient, which is not the same as one of zeros.
        wanted = [*wanted[:2], False, False]
        grad_output = torch.zeros_like(grad_residual_out)
    dropped = seed is not None
    # Without dropout the two gradients are the same tensor: it is computed, and handed on, once.
    either = wanted[0] or wanted[1]
    computed = [either, either and dropped, *wanted[2:]]
    grad_input, grad_residual, *grad_affine = or_none(
        add_row_norm_backward(
            grad_output, grad_residual_out, residual_out, weight, bias, seed, mean, rstd, *ctx.options, computed
        ),
        computed,
    )
    if not dropped:
        grad_residual = grad_input
    return *or_none((grad_input, grad_residual, *grad_affine), wanted), *none


def _add_row_norm_backward(
    grad_output,
    grad_residual_out,
    residual_out,
    weight,
    bias,
    seed,
    mean,
    rstd,
    columns,
    eps,
    centered,
    *options,
):
    *options, wanted = options
    operands = (residual_out, residual_out, weight, bias)
    grad_input, grad_residual = gradient_room(operands[:2], wanted[:2])
    grad_weight, grad_bias = coefficient_room((weight, bias), wanted[2:], residual_out)
    if residual_out.numel():
        backends.select(residual_out).add_row_norm_backward(
            rows_as_they_lie(grad_output, columns),
            rows_as_they_lie(grad_residual_out, columns),
            as_rows(residual_out, columns),
            vector(weight),
            vector(bias),
            seed,
            mean if centered else None,
            rstd,
            rows_or_none(grad_input, columns),
            rows_or_none(grad_residual, columns),
            grad_weight,
            grad_bias,
            eps,
            *options,
        )
    else:
        zero(grad_weight, grad_bias)
    return returned((grad_input, grad_residual, grad_weight, grad_bias), operands, residual_out)


def _add_row_norm_backward_fake(grad_output, grad_residual_out, residual_out, weight, bias, seed, mean, rstd, *options):
    return returned_fake((residual_out, residual_out, weight, bias), options[-1], residual_out)


def _add_row_norm_composed(input, residual, weight, bias, seed, columns, *options):
    rows = (as_rows(input, columns), as_rows(residual, columns))
    output, residual_out, _, _ = reference.add_row_norm(*rows, weight, bias, seed, *options)
    return output.reshape(input.shape), residual_out.reshape(input.shape)


def _add_row_norm_first_order(
    grad_output, grad_residual_out, residual_out, weight, bias, seed, mean, rstd, columns, eps, centered, *options
):
    *options, dropout_p, wanted = options

    def block(total, weight, bias):
        rows = as_rows(total, columns)
        output, _, _ = reference.row_norm(rows, weight, bias, eps, centered, "identity", *options)
        return output.reshape(total.shape), total

    grad_total, *grad_affine = reference.gradients(
        block,
        (residual_out, weight, bias),
        (grad_output, grad_residual_out),
        [wanted[0] or wanted[1], *wanted[2:]],
        create_graph=True,
    )
    grad_input = grad_total
    if wanted[0]:
        rows = as_rows(grad_total, columns)
        grad_input = reference.dropout(rows, seed, dropout_p).reshape(grad_total.shape)
    return or_none((grad_input, grad_total, *grad_affine), wanted)


_ADD_OPTIONS = (
    "SymInt columns, float eps, bool centered, str activation, float weight_offset, bool cast_before_weight,"
    " float dropout_p"
)
add_row_norm_backward = Op(
    "add_row_norm_backward(Tensor grad_output, Tensor? grad_residual_out, Tensor residual_out, Tensor? weight,"
    f" Tensor? bias, Tensor? seed, Tensor mean, Tensor rstd, {_ADD_OPTIONS}, bool[] wanted)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _add_row_norm_backward,
    _add_row_norm_backward_fake,
    *second_order(_add_row_norm_first_order, differentiable=5),
)
add_row_norm = Op(
    f"add_row_norm(Tensor input, Tensor residual, Tensor? weight, Tensor? bias, Tensor? seed, {_ADD_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _add_row_norm,
    _add_row_norm_fake,
    _add_row_norm_setup,
    _add_row_norm_backward_rule,
    _add_row_norm_composed,
    results=2,
    recipe=_add_row_norm_recipe,
    sharding=Sharding(_rows(5), (like_input, like_input, last_of_input, last_of_input, seed), (like_input, like_input)),
)


# gated_row_norm


def _gated_row_norm(input, gate, weight, columns, *options):
    output = contiguous(input)
    _, rstd = statistics(input, columns, centered=False)
    if output.numel():
        backends.select(input).gated_row_norm_forward(
            rows_as_they_lie(input, columns),
            rows_as_they_lie(gate, columns),
            vector(weight),
            as_rows(output, columns),
            rstd,
            *options,
        )
    return output, rstd


def _gated_row_norm_fake(input, gate, weight, columns, *options):
    return contiguous(input), statistics(input, columns, centered=False)[1]


def _gated_row_norm_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    input, gate, weight, *ctx.options = inputs
    _, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, gate, weight, rstd)


def _gated_row_norm_recipe(ctx: Any, inputs: tuple, output: tuple) -> tuple:
    options = inputs[3:]
    return lambda *tensors: _gated_row_norm(*tensors, *options)[0], inputs[:3]


def _gated_row_norm_backward_rule(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple:
    wanted, none = wanted_gradients(ctx, 3), (None,) * len(ctx.options)
    if grad_output is None:
        return None, None, None, *none
    found = gated_row_norm_backward(grad_output, *ctx.saved_tensors, *ctx.options, wanted)
    return *or_none(found, wanted), *none


def _gated_row_norm_backward(grad_output, input, gate, weight, rstd, columns, *options):
    *options, wanted = options
    _, _, norm_before_gate = options
    # A gate before the norm: both gradients come out of the same products.
    both = not norm_before_gate and (wanted[0] or wanted[1])
    grad_input, grad_gate = gradient_room((input, gate), (True, True) if both else wanted[:2])
    (grad_weight,) = coefficient_room((weight,), wanted[2:], input)
    if input.numel():
        backends.select(input).gated_row_norm_backward(
            rows_as_they_lie(grad_output, columns),
            rows_as_they_lie(input, columns),
            rows_as_they_lie(gate, columns),
            vector(weight),
            rstd,
            rows_or_none(grad_input, columns),
            rows_or_none(grad_gate, columns),
            grad_weight,
            *options,
        )
    else:
        zero(grad_weight)
    found = or_none((grad_input, grad_gate, grad_weight), wanted)
    return returned(found, (input, gate, weight), input)


def _gated_row_norm_backward_fake(grad_output, input, gate, weight, rstd, *options):
    return returned_fake((input, gate, weight), options[-1], input)


def _gated_row_norm_composed(input, gate, weight, columns, *options):
    rows = (as_rows(input, columns), as_rows(gate, columns))
    return (reference.gated_row_norm(*rows, weight, *options)[0].reshape(input.shape),)


def _gated_row_norm_first_order(grad_output, input, gate, weight, rstd, *options):
    *options, wanted = options

    def block(input, gate, weight):
        return _gated_row_norm_composed(input, gate, weight, *options)

    return reference.gradients(block, (input, gate, weight), (grad_output,), wanted, create_graph=True)


_GATED_OPTIONS = "SymInt columns, float eps, str activation, bool norm_before_gate"
gated_row_norm_backward = Op(
    "gated_row_norm_backward(Tensor grad_output, Tensor input, Tensor gate, Tensor? weight, Tensor rstd,"
    f" {_GATED_OPTIONS}, bool[] wanted) -> (Tensor, Tensor, Tensor)",
    _gated_row_norm_backward,
    _gated_row_norm_backward_fake,
    *second_order(_gated_row_norm_first_order, differentiable=4),
)
gated_row_norm = Op(
    f"gated_row_norm(Tensor input, Tensor gate, Tensor? weight, {_GATED_OPTIONS}) -> (Tensor, Tensor)",
    _gated_row_norm,
    _gated_row_norm_fake,
    _gated_row_norm_setup,
    _gated_row_norm_backward_rule,
    _gated_row_norm_composed,
    results=1,
    recipe=_gated_row_norm_recipe,
    sharding=Sharding(_rows(3), (like_input, like_input, last_of_input), (like_input,)),
)
