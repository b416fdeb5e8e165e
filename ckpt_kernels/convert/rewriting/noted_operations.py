"""Operations that are computed as written, and noted with their operands so that the outputs can be recomputed.

The autograd graph shows neither the number that was added to a tensor, nor an in-place write to an operand between the
operation that made the operand and the one that reads it. A note at the call has both.
"""

import ast
import operator
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...recompute import note

NOTED_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}
# Methods that cast.
NOTED_CASTS = ("to", "float", "type_as")
# The methods of tensors for these operators.
NOTED_METHODS = ("add", "sub", "mul")
_OF_TWO = tuple(getattr(torch, name) for name in NOTED_METHODS)
# Functions of one tensor that save only their output, functions of a sequence of tensors that save nothing, and the
# operators.
NOTED_FUNCTIONS = (torch.sigmoid, torch.tanh, torch.cat, torch.concat, torch.concatenate, *_OF_TWO)


def noted_operator(compute: Callable[[Any, Any], Any], watches: bool) -> Callable[[Any, Any], Any]:
    """The operator, with a note of both operands. `watches`: whether in-place writes to the output are seen."""

    def call(left: Any, right: Any) -> Any:
        output = compute(left, right)
        note(output, left, right, watches=watches)
        return output

    return call


def noted_cast(name: str) -> Callable[..., Any]:
    """A call of the method `name`, such as `value.to(...)`, with a note of a tensor that is cast."""

    def call(value: Any, /, *args: Any, **kwargs: Any) -> Any:
        output = getattr(value, name)(*args, **kwargs)
        if output is not value:
            note(output, value)
        return output

    return call


def noted_function(function: Callable[..., Any], watches: bool) -> Callable[..., Any]:
    """The function, with a note of the tensors that it reads."""

    def call(*args: Any, **kwargs: Any) -> Any:
        output = function(*args, **kwargs)
        if function in _OF_TWO:
            _note_of_two(output, args, kwargs, watches)
        elif args:
            note(output, *(args[0] if type(args[0]) in (tuple, list) else args[:1]))
        return output

    return call


def noted_method(method: Any, watches: bool) -> Any:
    """A method of a tensor for one of the operators, with a note of both operands; anything else unchanged."""
    if torch.compiler.is_compiling() or type(method) is not types.BuiltinMethodType:
        return method
    tensor = method.__self__
    if type(tensor) not in (Tensor, nn.Parameter):
        return method

    def call(*args: Any, **kwargs: Any) -> Any:
        output = method(*args, **kwargs)
        _note_of_two(output, (tensor, *args), kwargs, watches)
        return output

    return call


def _note_of_two(output: Any, args: tuple[Any, ...], kwargs: dict[str, Any], watches: bool) -> None:
    """Notes the operands of an operator, unless there are other arguments, which scale or place the result."""
    if len(args) == 2 and not kwargs:
        note(output, *args, watches=watches)
