"""The blocks between matrix products: activations, gates and norms, each with gradient and composition."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from . import bias_act, glu, row_norm


class Block(NamedTuple):
    """A block between matrix products.

    `forward(operands)` returns the output, and other tensors that the gradient needs. `backward(grad_output, operands,
    rest, wanted, rewrite)` returns the gradients of the operands, and the output if `rewrite`. It may write over
    grad_output, so that the peak is no higher than in eager torch's backward pass. `composed(operands)` is the block as
    the op that autograd sees.
    """

    forward: Callable[[Sequence[Tensor | None]], tuple[Tensor, tuple[Tensor, ...]]]
    backward: Callable[..., tuple[list[Tensor | None], Tensor | None]]
    composed: Callable[[Sequence[Tensor | None]], Tensor]


def act_block(activation: str, seed: Tensor | None, dropout_p: float) -> Block:
    """The block of (input,): dropout(activation(input))."""
    options = bias_act.Options(activation, dropout_p)

    def forward(operands: Sequence[Tensor | None]) -> tuple[Tensor, tuple[Tensor, ...]]:
        return bias_act.bias_act.forward(operands[0], None, seed, options)[0], ()

    def backward(grad: Tensor, operands: Sequence[Tensor | None], rest: tuple, wanted: Sequence[bool], rewrite: bool):
        grad_input, output = bias_act.gradient(grad, operands[0], seed, options, wanted[0], rewrite)
        return [grad_input], output

    return Block(forward, backward, lambda operands: bias_act.bias_act(operands[0], None, seed, options))


def glu_block(activation: str, layout: str, seed: Tensor | None, dropout_p: float) -> Block:
    """The block of (gate, value), or of (packed,): dropout(activation(gate) * value)."""
    options, drop = glu.PackedOptions(activation, layout), bias_act.Options("identity", dropout_p)

    def dropped(product: Tensor) -> Tensor:
        return product if seed is None else bias_act.bias_act.forward(product, None, seed, drop)[0]

    def forward(operands: Sequence[Tensor | None]) -> tuple[Tensor, tuple[Tensor, ...]]:
        return dropped(glu.forward(operands, options)), ()

    def backward(grad: Tensor, operands: Sequence[Tensor | None], rest: tuple, wanted: Sequence[bool], rewrite: bool):
        gradients, product = glu.gradient(dropped(grad), operands, options, wanted, rewrite)
        return gradients, None if product is None else dropped(product)

    def composed(operands: Sequence[Tensor | None]) -> Tensor:
        if len(operands) == 2:
            product = glu.glu(*operands, options.of_two)
        else:
            product = glu.packed_glu(*operands, options)
        return product if seed is None else bias_act.bias_act(product, None, seed, drop)

    return Block(forward, backward, composed)


def norm_block(*options: Any) -> Block:
    """The block of (input, weight, bias): a row norm; options as in `RowNormOptions`."""
    options, op = row_norm.RowNormOptions(*options), row_norm.row_norm

    def forward(operands: Sequence[Tensor | None]) -> tuple[Tensor, tuple[Tensor, ...]]:
        output, _, *statistics = op.forward(*_norm_operands(*operands), options)
        return output, tuple(statistics)

    def backward(grad: Tensor, operands: Sequence[Tensor | None], rest: tuple, wanted: Sequence[bool], rewrite: bool):
        kept = row_norm.Kept(operands[0], None, None, None, *operands[1:], None, *rest)
        wanted = (wanted[0], *(False,) * 4, *wanted[1:])
        grads, output = op.gradients_and_output((grad, None), kept, options, wanted, rewrite)
        return [grads[0], *grads[5:]], output

    return Block(forward, backward, lambda operands: op(*_norm_operands(*operands), options)[0])


def _norm_operands(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, ...]:
    """The operands of the row-norm op, without residual, gate, scale, shift and seed."""
    return input, None, None, None, None, weight, bias, None
