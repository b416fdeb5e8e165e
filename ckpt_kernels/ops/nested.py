"""Runs ops on jagged nested tensors: an op on rows, or an elementwise op, equals the same op on the values.

The op is called with the values, which autograd and torch.compile see. The results are nested by the same offsets.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def call(op: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    """Runs `op(*arguments)`, where the first argument, and all of the same shape, are nested. Returns one or several
    results."""
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
    """The values as a nested tensor with the offsets of another."""
    return torch.nested.nested_tensor_from_jagged(
        values,
        tensor.offsets(),
        tensor.lengths(),
        jagged_dim=tensor._ragged_idx,
        # The cached lengths. The public attributes would compute them.
        min_seqlen=tensor._maybe_min_seqlen,
        max_seqlen=tensor._maybe_max_seqlen,
    )
