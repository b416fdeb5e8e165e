"""Arguments of calls that are to be made again: what may be one, what is noted of one, and how it is had back."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# What may be handed to a layer that is to run again: nothing that a layer writes to and somebody else reads.
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


class Link(NamedTuple):
    """An argument that is an output of an earlier call of the run."""

    call: int
    output: int


class Input(NamedTuple):
    """An argument that is kept: the tensor, or what a context around keeps in its place."""

    get: Callable[[], Tensor]
    requires_grad: bool


def are_plain(values: Sequence[Any]) -> bool:
    """Whether values are tensors, numbers, strings, and plain tuples and dicts of these."""
    for value in values:
        if type(value) in (tuple, dict):
            if not are_plain(tuple(value.values()) if isinstance(value, dict) else value):
                return False
        elif not (isinstance(value, _PLAIN) or (isinstance(value, Tensor) and value.layout is torch.strided)):
            return False
    return True


class _FromOutside(torch.autograd.Function):
    """The identity: inputs of the second pass have a node behind them, as at first, of which no recipe is known."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        return input.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0]


def loaded(noted: Any, inputs: dict[int, Tensor], outputs: list[list[Tensor]]) -> Any:
    """The argument that was noted, of calls that are made again; `inputs` are those that were loaded before."""
    if isinstance(noted, Link):
        return outputs[noted.call][noted.output]
    if isinstance(noted, Input):
        if id(noted) not in inputs:
            tensor = noted.get()
            inputs[id(noted)] = _FromOutside.apply(tensor.detach().requires_grad_()) if noted.requires_grad else tensor
        return inputs[id(noted)]
    if isinstance(noted, tuple):
        return tuple(loaded(part, inputs, outputs) for part in noted)
    if isinstance(noted, dict):
        return {key: loaded(part, inputs, outputs) for key, part in noted.items()}
    return noted


def version_checked(tensor: Tensor, what: str = "an argument of a checkpointed layer") -> Callable[[], Tensor]:
    """The tensor, if nobody has written to it by then; `what` it is, for the error."""
    version = version_of(tensor)
    held = tensor if tensor.is_leaf else tensor.detach()

    def get() -> Tensor:
        if version is not None and held._version != version:
            raise RuntimeError(
                f"{what}, {held.dtype} {tuple(held.shape)}, was modified by an in-place "
                f"operation since: it is at version {held._version}; expected version {version}"
            )
        return held

    return get


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was written to; None where nobody counts."""
    return None if tensor.is_inference() else tensor._version
