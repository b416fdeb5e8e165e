"""The DyT op: tanh(alpha * input) * weight + bias, elementwise. The op keeps the input."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import backends
from ..backends import reference
from .block import Block, NoOptions
from .operands import (
    as_matrices,
    elementwise_empty,
    in_dtypes_of,
    last_columns,
    layout_and_target,
    vector,
    wide_empty,
    zero,
)
from .sharding import Sharding, every_dim, last_of_input, like_input, of_no_dim


class _Dyt(Block):
    name = "dyt"
    operands = "Tensor input, Tensor alpha, Tensor? weight, Tensor? bias"
    differentiable = 4
    elementwise = True
    sharding = Sharding(every_dim, (like_input, of_no_dim, last_of_input, last_of_input), (like_input,))

    def empty(self, input: Tensor, *rest: Any) -> tuple[Tensor]:
        return (elementwise_empty(input),)

    def forward(
        self, input: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None, options: NoOptions
    ) -> tuple[Tensor]:
        (output,) = results = self.empty(input)
        if output.numel():
            layout, target = layout_and_target(output, input.shape, 1)
            rows, output_rows = as_matrices(layout, input, target, columns=last_columns(input))
            backends.select(input).dyt_forward(rows, alpha, vector(weight), vector(bias), output_rows)
            if target is not output:
                output.copy_(target)
        return results

    def empty_gradients(
        self, grads: Sequence[Tensor], kept: Sequence[Tensor | None], options: NoOptions, wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """Allocates the gradients. The input's has the strides of torch's product of grad_output with the weight, or
        with the slope."""
        (grad_output,), (input, _, weight, _) = grads, kept
        other = input if weight is None else weight.expand_as(input)
        grad_input = elementwise_empty(grad_output, other) if wanted[0] else None
        return grad_input, *super().empty_gradients(grads, kept[1:], options, wanted[1:])

    def gradients(
        self, grads: Sequence[Tensor], kept: Sequence[Tensor | None], options: NoOptions, wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        (grad_output,), (input, alpha, weight, _) = grads, kept
        grad_input = self.empty_gradients(grads, kept, options, [wanted[0], False, False, False])[0]
        dtype = reference.compute_dtype(input.dtype)
        sums = [wide_empty(t, dtype) if w else None for t, w in zip(kept[1:], wanted[1:], strict=True)]
        if input.numel():
            layout, target = layout_and_target(grad_input, input.shape, 1)
            matrices = as_matrices(layout, grad_output, input, target, columns=last_columns(input))
            backends.select(input).dyt_backward(*matrices[:2], alpha, vector(weight), matrices[2], *sums)
            if target is not grad_input:
                grad_input.copy_(target)
        else:
            zero(*sums)
        return in_dtypes_of(kept, (grad_input, *sums))

    def composition(
        self, input: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None, options: NoOptions
    ) -> tuple[Tensor]:
        return (reference.dyt(input, alpha, weight, bias),)


dyt = _Dyt()
