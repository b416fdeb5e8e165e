"""The rotary op: rotates pairs of each head by the angles of two tables, optionally after a norm.

Without a norm only the tables are kept; with a norm the input too. Statistics are not kept: a head fits into registers.
"""

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor

from .. import backends
from ..backends import reference
from ..backends.blocks import Rotary, RotaryGradients, RotaryOptions
from .block import Block
from .operands import (
    contiguous,
    elementwise_empty,
    in_dtypes_of,
    layout_and_target,
    memory_order,
    vector,
    wide_empty,
    zero,
)
from .sharding import Sharding, last_of_input, like_input


def _heads(arguments: Sequence[Any]) -> Collection[int]:
    """The dimensions that may be split: those of heads, and not the one that is rotated."""
    return range(arguments[0].dim() - 1)


def _table_of_input(tensor: Tensor, arguments: Sequence[Any]) -> Sequence[int | None]:
    """The input's dimensions of a table. Except for the last they have the input's size, or 1 for all."""
    first = arguments[0].dim() - tensor.dim()
    sizes = zip(tensor.shape[:-1], arguments[0].shape[first:], strict=False)
    return [*(first + dim if size == whole else None for dim, (size, whole) in enumerate(sizes)), None]


class _Rotary(Block):
    name = "rotary"
    operands = "Tensor input, Tensor cos, Tensor sin, Tensor? weight, Tensor? bias"
    kept = "Tensor? input, Tensor cos, Tensor sin, Tensor? weight, Tensor? bias"
    differentiable = 5
    options = RotaryOptions
    sharding = Sharding(
        _heads, (like_input, _table_of_input, _table_of_input, last_of_input, last_of_input), (like_input,)
    )

    def empty(self, input: Tensor, *rest: Any) -> tuple[Tensor]:
        return (contiguous(input) if rest[-1].contiguous else elementwise_empty(input),)

    def forward(self, *arguments: Any) -> tuple[Tensor]:
        (output,) = results = self.empty(*arguments)
        if output.numel():
            layout, target = layout_and_target(output, output.shape, 1)
            block, rows = _rows(arguments, layout, target)
            backends.select(output).rotary_forward(block, rows)
            if target is not output:
                output.copy_(target)
        return results

    def keep(self, arguments: Sequence[Any], results: Sequence[Tensor | None], wanted: Sequence[bool]) -> tuple:
        input, *rest, options = arguments
        is_needed = options.norm != "none" or wanted[1] or wanted[2]
        return (input if is_needed else None, *rest), options

    def empty_gradients(
        self, grads: Sequence[Tensor | None], kept: Sequence[Tensor | None], options: Any, wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        grad_input = elementwise_empty(grads[0] if kept[0] is None else kept[0]) if wanted[0] else None
        return grad_input, *super().empty_gradients(grads, kept[1:], options, wanted[1:])

    def gradients(
        self,
        grads: Sequence[Tensor | None],
        kept: Sequence[Tensor | None],
        options: RotaryOptions,
        wanted: Sequence[bool],
    ) -> Sequence[Tensor | None]:
        (grad_output,), (weight, bias) = grads, kept[3:]
        grad_input = self.empty_gradients(grads, kept, options, [wanted[0], *(False,) * 4])[0]
        dtype = reference.compute_dtype(grad_output.dtype)
        sums = [wide_empty(t, dtype) if w else None for t, w in zip((weight, bias), wanted[3:], strict=True)]
        tables: Sequence[Tensor | None] = (None, None)
        if grad_output.numel():
            layout, target = layout_and_target(grad_input, grad_output.shape, 1)
            block, rows, target_rows = _rows((*kept, options), layout, grad_output, target)
            backends.select(grad_output).rotary_backward(block, rows, RotaryGradients(target_rows, *sums))
            if target is not grad_input:
                grad_input.copy_(target)
        else:
            zero(*sums)
        if wanted[1] or wanted[2]:
            tables = reference.rotary_table_gradients(Rotary(*kept, options), grad_output)
        gradients = [g if w else None for g, w in zip((grad_input, *tables, *sums), wanted, strict=True)]
        return in_dtypes_of((grad_output, *kept[1:]), gradients)

    def composition(self, *arguments: Any) -> tuple[Tensor]:
        output = reference.rotary(Rotary(*arguments))
        return (output.contiguous() if arguments[-1].contiguous else output,)

    def first_order(
        self, grads: Sequence[Tensor | None], kept: Sequence[Tensor | None], options: Any, wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """Without a kept input only the input's gradient is wanted, which is the inverse rotation."""
        if kept[0] is None:
            return reference.rotated_back(grads[0], Rotary(*kept, options)), *(None,) * 4
        return super().first_order(grads, kept, options, wanted)


def _rows(arguments: Sequence[Any], layout: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """The block for the backends, and other tensors of the input's shape.

    Rows are on three levels, in the order in which the rows of the dense tensor `layout` lie in memory.
    """
    input, cos, sin, weight, bias, options = arguments
    strides = layout.stride()
    order = (*memory_order(strides[:-1]), len(strides) - 1)
    tensors = [_on_levels(t, order) for t in (input, *others)]
    tables = [_table_on_levels(table, layout.shape, order) for table in (cos, sin)]
    return Rotary(tensors[0], *tables, vector(weight), vector(bias), options), *tensors[1:]


def _on_levels(tensor: Tensor | None, order: Sequence[int]) -> Tensor | None:
    """The tensor with rows on three levels."""
    if tensor is None:
        return None
    tensor = tensor.permute(order)
    shape = tensor.shape
    tensor = tensor[(None,) * (4 - len(shape))] if len(shape) <= 4 else tensor.reshape(-1, *shape[-3:])
    return tensor if shape[-1] == 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def _table_on_levels(table: Tensor, shape: Sequence[int], order: Sequence[int]) -> Tensor:
    """A table with rows on three levels, expanded if more are merged."""
    table = table[(None,) * (len(shape) - table.dim())].permute(order)
    if len(shape) > 4 and any(size != 1 for size in table.shape[:-3]):
        sizes = [shape[dim] for dim in order[:-3]]
        table = table.expand(*sizes, *table.shape[-3:])
    if len(shape) > 4:
        return table.reshape(-1, *table.shape[-3:]).contiguous()
    table = table[(None,) * (4 - len(shape))]
    return table if table.shape[-1] == 1 or table.stride(-1) == 1 else table.contiguous()


rotary = _Rotary()
