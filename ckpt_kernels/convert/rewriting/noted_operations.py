"""Operations that are computed as written, and noted with their operands so that the outputs can be recomputed.

The autograd graph shows neither the number that was added to a tensor, nor an in-place write to an operand between the
operation that made the operand and the one that reads it. A note at the call has both.
"""

import ast
import operator
from collections.abc import Callable
from typing import Any

import torch

from ...recompute import note

NOTED_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}
# Functions of one tensor that save only their output, and functions of a sequence of tensors that save nothing.
NOTED_FUNCTIONS = (torch.sigmoid, torch.tanh, torch.cat, torch.concat, torch.concatenate)


def noted_operator(compute: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """The operator, with a note of both operands."""

    def call(left: Any, right: Any) -> Any:
        output = compute(left, right)
        note(output, left, right)
        return output

    return call


def noted_cast(value: Any, *args: Any, **kwargs: Any) -> Any:
    """`value.to(...)`, with a note of a tensor that is cast."""
    output = value.to(*args, **kwargs)
    if output is not value:
        note(output, value)
    return output


def noted_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with a note of the tensors that it reads."""

    def call(*args: Any, **kwargs: Any) -> Any:
        output = function(*args, **kwargs)
        if args:
            note(output, *(args[0] if type(args[0]) in (tuple, list) else args[:1]))
        return output

    return call
