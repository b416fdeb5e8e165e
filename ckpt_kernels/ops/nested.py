"""Jagged nested tensors: an op by rows, or by elements, of a nested tensor is the same op of its values.

So it is called with these, which autograd and torch.compile see, and its results are nested by the same offsets.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def call(op: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    """`op(*arguments)`, of which the first is nested, and so is all that has its shape; one or several results."""
    first = arguments[0]
    values = [t.values() if isinstance(t, Tensor) and t.is_nested else t for t in arguments]
    for argument, tensor in zip(arguments, values, strict=True):
        if argument is not tensor and tensor.shape != values[0].shape:
            raise RuntimeError(
                f"nested tensors have values of shapes {tuple(values[0].shape)} and {tuple(tensor.shape)}; "
                "expected the same"
            )
    outputs = op(*values)
    if isinstance(outputs, Tensor):
        return _nested_as(first, outputs)
    return tuple(None if output is None else _nested_as(first, output) for output in outputs)


def _nested_as(tensor: Tensor, values: Tensor) -> Tensor:
    return torch.nested.nested_tensor_from_jagged(
        values,
        tensor.offsets(),
        tensor.lengths(),
        jagged_dim=tensor._ragged_idx,
        # What is known of them; asked for by their public names they would be computed.
        min_seqlen=tensor._maybe_min_seqlen,
        max_seqlen=tensor._maybe_max_seqlen,
    )
