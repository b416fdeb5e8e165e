"""The bias_act op: dropout(activation(input + bias)).

The op keeps as little as the gradient needs: no tensor if the activation is the identity; the output, which its reader
keeps too, if the sign of the output equals that of the input; else the input. For dropout the seed is kept, and no
mask.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .. import backends
from ..activations import SIGNED_BY_OUTPUT
from ..backends import reference
from .block import Block
from .operands import (
    as_matrices,
    column_sum,
    contiguous,
    elementwise_empty,
    in_dtypes_of,
    last_columns,
    layout_and_target,
    reuse_or_allocate,
    vector,
    wide_empty,
    with_elementwise_strides,
    zero,
)
from .sharding import Sharding, every_dim, last_of_input, like_input, seed

# For these activations torch's gradients have the strides of the forward pass's tensors; for all others, those of
# grad_output.
_GRADIENT_LIKE_KEPT = ("relu", "leaky_relu", "relu_squared")


class Options(NamedTuple):
    activation: str
    dropout_p: float = 0.0


class _BiasAct(Block):
    name = "bias_act"
    operands = "Tensor input, Tensor? bias, Tensor? seed"
    differentiable = 2
    options = Options
    kept = "Tensor? kept, Tensor? bias, Tensor? seed"
    elementwise = True
    sharding = Sharding(every_dim, (like_input, last_of_input, seed), (like_input,))

    def empty(self, input: Tensor, *rest: Any) -> tuple[Tensor]:
        return (elementwise_empty(input),)

    def forward(self, input: Tensor, bias: Tensor | None, seed: Tensor | None, options: Options) -> tuple[Tensor]:
        output = elementwise_empty(input)
        if output.numel():
            layout, target = layout_and_target(output, input.shape, _fixed_dims(input, bias, seed))
            rows, output_rows = _matrices(bias, seed, layout, input, target)
            backends.select(input).bias_act_forward(rows, vector(bias), seed, output_rows, *options)
            if target is not output:
                output.copy_(target)
        return (output,)

    def keep(self, arguments: Sequence[Any], results: Sequence[Tensor], wanted: Sequence[bool]) -> tuple:
        input, bias, seed, options = arguments
        by_output = options.activation in SIGNED_BY_OUTPUT
        kept = None if options.activation == "identity" else results[0] if by_output else input
        return (kept, bias, seed), options

    def recipe(self, ctx: Any, arguments: Sequence[Any], results: Sequence[Tensor]) -> tuple | None:
        """None if the output is kept anyway. A recipe needs a kept input, or an input with a recipe."""
        activation, seed = arguments[-1].activation, arguments[2]
        if activation in SIGNED_BY_OUTPUT or (activation == "identity" and seed is None):
            return None
        return super().recipe(ctx, arguments, results)

    def gradients(
        self, grads: Sequence[Tensor], kept: Sequence[Tensor | None], options: Options, wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        (grad_output,), (kept, bias, seed) = grads, kept
        if kept is None:
            # The gradient takes the same path as the input.
            (grad_input,) = self.forward(grad_output, None, seed, Options("identity", options.dropout_p))
            return grad_input if wanted[0] else None, column_sum(grad_input, bias) if wanted[1] else None
        grad_input = _empty_gradient(grad_output, kept, options) if wanted[0] else None
        grad_bias = wide_empty(bias, reference.compute_dtype(kept.dtype)) if wanted[1] else None
        if kept.numel():
            layout, target = layout_and_target(grad_input, kept.shape, _fixed_dims(kept, bias, seed))
            rows, kept_rows, grad_rows = _matrices(bias, seed, layout, grad_output, kept, target)
            added = None if options.activation in SIGNED_BY_OUTPUT else vector(bias)
            backend = backends.select(kept)
            backend.bias_act_backward(rows, kept_rows, added, seed, grad_rows, grad_bias, None, *options)
            if target is not grad_input:
                grad_input.copy_(target)
        else:
            zero(grad_bias)
        return in_dtypes_of((grad_output, bias), (grad_input, grad_bias))

    def empty_gradients(
        self, grads: Sequence[Tensor], kept: Sequence[Tensor | None], options: Options, wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        (grad_output,), (kept, bias, _) = grads, kept
        grad_input = elementwise_empty(grad_output) if kept is None else _empty_gradient(grad_output, kept, options)
        return (
            grad_input.to(grad_output.dtype) if wanted[0] else None,
            contiguous(bias) if wanted[1] and bias is not None else None,
        )

    def composition(self, input: Tensor, bias: Tensor | None, seed: Tensor | None, options: Options) -> tuple[Tensor]:
        if seed is None:
            return (reference.bias_act(input, bias, seed, *options),)
        columns = last_columns(input)
        rows = input.reshape(input.numel() // max(columns, 1), columns)
        return (reference.bias_act(rows, bias, seed, *options).reshape(input.shape),)

    def first_order(
        self, grads: Sequence[Tensor], kept: Sequence[Tensor | None], options: Options, wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        (grad_output,), (kept, bias, seed) = grads, kept
        if kept is None:
            (grad_input,) = self.composition(grad_output, None, seed, Options("identity", options.dropout_p))
            return grad_input if wanted[0] else None, column_sum(grad_input, bias) if wanted[1] else None
        by_output = options.activation in SIGNED_BY_OUTPUT

        def block(input: Tensor, bias: Tensor | None) -> tuple[Tensor]:
            # The output includes the bias already. This term is zero, but has the bias's gradient.
            added = bias - bias.detach() if by_output and bias is not None else bias
            return self.composition(input, added, seed, options)

        return reference.gradients(block, (kept, bias), grads, wanted)


bias_act = _BiasAct()


def _fixed_dims(input: Tensor, bias: Tensor | None, seed: Tensor | None) -> int:
    """How many of the last dimensions must keep their order: all for a dropout mask, one for a bias."""
    return input.dim() if seed is not None else 0 if bias is None else 1


def _matrices(bias: Tensor | None, seed: Tensor | None, layout: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors as matrices, with rows along the last dimension if there is a bias or dropout."""
    return as_matrices(layout, *tensors, columns=None if bias is None and seed is None else last_columns(layout))


def _empty_gradient(grad_output: Tensor, kept: Tensor, options: Options) -> Tensor:
    as_kept = options.activation in _GRADIENT_LIKE_KEPT
    return elementwise_empty(*((kept, grad_output) if as_kept else (grad_output, kept)))


def gradient(
    grad_output: Tensor,
    input: Tensor,
    seed: Tensor | None,
    options: Options,
    wanted: bool,
    rewrite: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradient of the input, without a bias; and the output, recomputed, if `rewrite`.

    The caller gives `grad_output` away: the gradient overwrites that tensor, element by element, if the sizes fit.
    """
    grad_output = grad_output.contiguous()
    grad_input = reuse_or_allocate(grad_output, input) if wanted else None
    output = contiguous(grad_output) if rewrite else None
    if input.numel():
        rows, input_rows, *results = _matrices(None, seed, grad_output, grad_output, input, grad_input, output)
        backends.select(input).bias_act_backward(rows, input_rows, None, seed, results[0], None, results[1], *options)
    return grad_input, None if output is None else with_elementwise_strides(input, output)
