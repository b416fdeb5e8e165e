"""Operations that are computed as they are written, and noted: so that what they make can be made again.

The autograd graph does not say whether somebody wrote to an operand between the operation that made it and the one that
reads it, nor which number was added. Where the operation is called here both are seen.
"""

import ast
import operator
from collections.abc import Callable
from typing import Any

import torch

from ...recompute import note

OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}
# Functions of one tensor that save their result alone, and those of several, in a sequence, that save nothing.
FUNCTIONS = (torch.sigmoid, torch.tanh, torch.cat, torch.concat, torch.concatenate)


def noted_operator(compute: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """The operator, for both operands."""

    def call(left: Any, right: Any) -> Any:
        output = compute(left, right)
        note(output, left, right)
        return output

    return call


def noted_function(function: Callable[..., Any]) -> Callable[[Any], Any]:
    """Of what is about to be called: the function, noted, if it is that one, and anything else as it is."""

    def call(*args: Any, **kwargs: Any) -> Any:
        output = function(*args, **kwargs)
        if args:
            note(output, *(args[0] if type(args[0]) in (tuple, list) else args[:1]))
        return output

    return lambda called: call if called is function else called
