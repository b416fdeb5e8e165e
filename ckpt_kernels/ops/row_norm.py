"""The row-norm op: LayerNorm and RMSNorm with all fused steps, as `backends.blocks.RowNorm` describes.

The op takes tensors of any leading shape, normalizes their last dimensions of `columns` elements, and returns
contiguous outputs. With a residual, the sum is the second output and is kept; else the input is kept. Scale and shift,
a row for each sample, modulate: (x_hat * weight + bias) * (1 + scale) + shift.
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..backends import reference
from ..backends.blocks import RowNorm, RowNormGradients, RowNormOptions
from .block import Block
from .operands import as_rows, column_sum, contiguous, in_dtypes_of, strided_rows, wide_empty, zero
from .sharding import Sharding, dims_of_rows, last_of_input, like_input, seed


class Kept(NamedTuple):
    """The tensors for the gradients; `input` is residual_out if there is a residual.

    If only the gradient of a bias is wanted, and the bias is the last step, only the bias is kept.
    """

    input: Tensor | None
    gate: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    seed: Tensor | None
    mean: Tensor | None
    rstd: Tensor | None


class _Wanted(NamedTuple):
    """Which gradients are wanted."""

    input: bool
    residual: bool
    gate: bool
    scale: bool
    shift: bool
    weight: bool
    bias: bool


def _rows(arguments: Sequence[Any]) -> Collection[int]:
    """The dimensions that may be split: those of rows, and not the normalized ones."""
    return range(dims_of_rows(arguments[0].shape, arguments[-1].columns))


def _samples_of_input(tensor: Tensor, arguments: Sequence[Any]) -> Sequence[int | None]:
    """The input's dimensions of scale and shift, which have the input's sizes, or 1 for all samples."""
    samples = dims_of_rows(tensor.shape, arguments[-1].columns)
    sizes = zip(tensor.shape, arguments[0].shape, strict=False)
    return [dim if dim < samples and size == whole else None for dim, (size, whole) in enumerate(sizes)]


class _RowNorm(Block):
    name = "row_norm"
    operands = (
        "Tensor input, Tensor? residual, Tensor? gate, Tensor? scale, Tensor? shift, Tensor? weight, Tensor? bias,"
        " Tensor? seed"
    )
    kept = (
        "Tensor? input, Tensor? gate, Tensor? scale, Tensor? shift, Tensor? weight, Tensor? bias, Tensor? seed,"
        " Tensor? mean, Tensor? rstd"
    )
    differentiable = 7
    options = RowNormOptions
    results = ("output", "residual_out", "mean", "rstd")
    returned = differentiable_results = 2
    terms = 2
    sharding = Sharding(
        _rows,
        (*(like_input,) * 3, _samples_of_input, _samples_of_input, last_of_input, last_of_input, seed),
        (like_input, like_input),
    )

    def empty(self, input: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor | None, ...]:
        options = rest[-1]
        rows, dtype = input.numel() // options.columns, reference.compute_dtype(input.dtype)
        mean = input.new_empty(rows, dtype=dtype) if options.centered else None
        residual_out = None if residual is None else contiguous(input)
        return contiguous(input), residual_out, mean, input.new_empty(rows, dtype=dtype)

    def forward(self, input: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor | None, ...]:
        gate, scale, shift, weight, bias, seed, options = rest
        output, residual_out, mean, rstd = results = self.empty(input, residual, options)
        if output.numel():
            if scale is not None:
                weight, bias = _modulated(scale, shift, weight, bias, options.columns, rstd.dtype)
            block = _block(input, residual, gate, weight, bias, seed, mean, rstd, options)
            sums = None if residual_out is None else as_rows(residual_out, options.columns)
            backends.select(input).row_norm_forward(block, as_rows(output, options.columns), sums)
            if options.columns == 1 and options.centered:
                # One element minus its mean is always 0. So the backward pass must give gradients of 0, and not
                # rounding errors that eps makes large.
                rstd.mul_(0)
        return results

    def present(self, arguments: Sequence[Any], results: Sequence[Tensor]) -> Sequence[Tensor | None]:
        return results if arguments[1] is not None else (results[0], None)

    def keep(self, arguments: Sequence[Any], results: Sequence[Tensor | None], wanted: Sequence[bool]) -> tuple:
        input, residual, *rest, options = arguments
        gate, scale, _, _, bias, _ = rest
        _, residual_out, mean, rstd = results
        is_last = options.activation == "identity" and gate is None and scale is None and residual is None
        if is_last and not any(wanted[:6]):
            return Kept(None, None, None, None, None, bias, None, None, None), options
        return (input if residual is None else residual_out, *rest, mean, rstd), options

    def recipe(self, ctx: Any, arguments: Sequence[Any], results: Sequence[Tensor | None]) -> tuple | None:
        """The norm of the kept input, with the kept statistics."""
        kept, options = self.keep(arguments, results, ctx.needs_input_grad)
        return None if kept[0] is None else (lambda *again: rebuilt(again, options), tuple(kept))

    def total(self, arguments: Sequence[Any], results: Sequence[Tensor | None]) -> Any:
        """The sum, rounded as in the forward pass: torch adds in float32 too."""
        input, residual, *_, seed, _ = arguments
        return None if residual is None or seed is not None else (results[1], (_sum, (residual, input)))

    def differentiated(
        self, grads: Sequence[Tensor | None], kept: Sequence[Tensor | None], options: Any, wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        grad_output, grad_sum = grads
        if grad_sum is not None and (kept[0] is None or grad_sum.shape != kept[0].shape):
            # This is the gradient of the dispatcher's empty tensor, which stands for a missing sum.
            grads = grad_output, grad_sum = grad_output, None
            if grad_output is None:
                return (None,) * self.differentiable
        if grad_output is None:
            # The norm's output was not used, so its weights have no gradient, which differs from a gradient of zeros.
            grads = torch.zeros_like(grad_sum), grad_sum
            wanted = [*wanted[:2], *(False,) * 5]
        if not wanted[1] or kept[6] is not None:
            return super().differentiated(grads, kept, options, wanted)
        # Without dropout the gradients of input and residual are one tensor, which is computed and passed on once.
        grad, _, *rest = super().differentiated(grads, kept, options, [True, False, *wanted[2:]])
        return [grad if wanted[0] else None, grad, *rest]

    def gradients(
        self, grads: Sequence[Tensor | None], kept: Sequence[Tensor | None], options: Any, wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        return self.gradients_and_output(grads, kept, options, wanted, False)[0]

    def gradients_and_output(
        self,
        grads: Sequence[Tensor | None],
        kept: Sequence[Tensor | None],
        options: RowNormOptions,
        wanted: Sequence[bool],
        rewrite: bool,
    ) -> tuple[Sequence[Tensor | None], Tensor | None]:
        """The wanted gradients, in the operands' dtypes, and the output, recomputed, if `rewrite`."""
        input, gate, scale, shift, weight, bias, seed, mean, rstd = kept
        if input is None:
            return (None,) * 6 + (column_sum(grads[0], bias),), None
        wanted = _Wanted(*wanted)
        columns, dtype = options.columns, reference.compute_dtype(input.dtype)
        total = wanted.input or wanted.residual
        # With a gate before the norm, both gradients come from the same products.
        both = options.gate_before_norm and (wanted.input or wanted.gate)
        factor, offset, need_factor, need_offset = weight, bias, wanted.weight, wanted.bias
        if scale is not None:
            factor, offset = _modulated(scale, shift, weight, bias, columns, dtype)
            need_factor = wanted.scale or wanted.weight or wanted.bias
            need_offset = wanted.scale or wanted.shift or wanted.bias
        gradients = RowNormGradients(
            contiguous(input) if total or both else None,
            contiguous(input) if total and seed is not None else None,
            contiguous(gate) if both or wanted.gate else None,
            wide_empty(factor, dtype) if need_factor else None,
            wide_empty(offset, dtype) if need_offset else None,
        )
        output = contiguous(input) if rewrite else None
        if input.numel():
            grad_output, grad_residual_out = grads
            block = _block(input, None, gate, factor, offset, seed, mean if options.centered else None, rstd, options)
            large = [None if t is None else as_rows(t, columns) for t in gradients[:3]]
            backends.select(input).row_norm_backward(
                block,
                strided_rows(grad_output, columns),
                None if grad_residual_out is None else strided_rows(grad_residual_out, columns),
                RowNormGradients(*large, *gradients[3:]),
                None if output is None else as_rows(output, columns),
            )
        else:
            zero(*gradients[3:])
        coefficients = (None, None, *gradients[3:])
        if scale is not None:
            coefficients = _modulation_gradients(Kept(*kept), gradients.weight, gradients.bias, wanted)
        gradients = [g if w else None for g, w in zip((*gradients[:3], *coefficients), wanted, strict=True)]
        return in_dtypes_of((input, input, *kept[1:6]), gradients), output

    def empty_gradients(
        self, grads: Sequence[Tensor | None], kept: Sequence[Tensor | None], options: Any, wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        operands = kept[:1] * 2 + kept[1:6]
        return [contiguous(t) if w and t is not None else None for t, w in zip(operands, wanted, strict=True)]

    def composition(self, input: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor | None]:
        gate, scale, shift, weight, bias, seed, options = rest
        columns = options.columns
        rows = [None if t is None else as_rows(t, columns) for t in (input, residual, gate)]
        if scale is not None:
            weight, bias = _modulated(scale, shift, weight, bias, columns, reference.compute_dtype(input.dtype))
        output, residual_out, _, _ = reference.row_norm(RowNorm(*rows, weight, bias, seed, None, None, options))
        return output.reshape(input.shape), None if residual_out is None else residual_out.reshape(input.shape)

    def first_order(
        self, grads: Sequence[Tensor | None], kept: Sequence[Tensor | None], options: Any, wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        input, *_, bias, seed, _, _ = kept
        if input is None:
            return (None,) * 6 + (column_sum(grads[0], bias),)

        def block(input: Tensor, *operands: Tensor | None) -> Sequence[Tensor]:
            return self.composition(input, None, *operands, None, options)[0], input

        needed = [wanted[0] or wanted[1], *wanted[2:]]
        total, *others = reference.gradients(block, kept[:6], grads, needed)
        grad_input = total
        if wanted[0] and seed is not None:
            rows = as_rows(total, options.columns)
            grad_input = reference.dropout(rows, seed, options.dropout_p).reshape(total.shape)
        return [grad_input if wanted[0] else None, total if wanted[1] else None, *others]


def _block(
    input: Tensor, residual: Tensor | None, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None, *rest: Any
) -> RowNorm:
    """The block for the backends."""
    columns = rest[-1].columns
    return RowNorm(
        strided_rows(input, columns),
        None if residual is None else strided_rows(residual, columns),
        None if gate is None else strided_rows(gate, columns),
        None if weight is None else weight.contiguous(),
        None if bias is None else bias.contiguous(),
        *rest,
    )


def _sum(residual: Tensor, input: Tensor) -> Tensor:
    return (residual + input).contiguous()


def rebuilt(kept: Sequence[Tensor | None], options: RowNormOptions) -> Tensor:
    """Recomputes the output from the kept tensors."""
    input, gate, scale, shift, weight, bias, _, mean, rstd = kept
    output = contiguous(input)
    if output.numel():
        if scale is not None:
            weight, bias = _modulated(scale, shift, weight, bias, options.columns, rstd.dtype)
        block = _block(input, None, gate, weight, bias, None, mean if options.centered else None, rstd, options)
        backends.select(input).row_norm_forward(block, as_rows(output, options.columns), None, True)
    return output


def _modulated(
    scale: Tensor, shift: Tensor, weight: Tensor | None, bias: Tensor | None, columns: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(x_hat * weight + bias) * (1 + scale) + shift, as one weight and one bias for each sample."""
    factor = 1 + as_rows(scale.to(dtype), columns)
    offset = as_rows(shift.to(dtype), columns)
    # If rows have no elements, weight and bias have none either.
    if bias is not None and bias.numel():
        offset = offset + factor * bias.to(dtype).reshape(columns)
    if weight is not None and weight.numel():
        factor = factor * weight.to(dtype).reshape(columns)
    return factor, offset


def _modulation_gradients(
    kept: Kept, grad_factor: Tensor | None, grad_offset: Tensor | None, wanted: _Wanted
) -> list[Tensor | None]:
    """The gradients of scale, shift, weight and bias, from those of the merged weight and bias."""
    operands = kept.scale, kept.shift, kept.weight, kept.bias
    grads: list[Tensor | None] = [grad_factor, grad_offset, None, None]
    if wanted.scale and kept.weight is not None:
        grads[0] = grad_factor * kept.weight.to(grad_factor.dtype).flatten()
    if wanted.scale and kept.bias is not None:
        grads[0] = grads[0] + grad_offset * kept.bias.to(grad_offset.dtype).flatten()
    for place, wants, grad in ((2, wanted.weight, grad_factor), (3, wanted.bias, grad_offset)):
        if wants:
            grads[place] = (grad * (1 + kept.scale.to(grad.dtype).reshape(grad.shape))).sum(0)
    # Rows without elements are treated as rows of one element.
    return [
        None if g is None else g.reshape(t.shape) if t.numel() else g.new_zeros(t.shape)
        for g, t in zip(grads, operands, strict=True)
    ]


row_norm = _RowNorm()
