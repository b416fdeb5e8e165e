"""What hooks on saved tensors have in common."""

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def as_is(tensor: Tensor) -> Tensor:
    """Packs or unpacks a tensor as what it is."""
    return tensor


def without_saved_tensor_hooks() -> AbstractContextManager:
    """What is saved within is kept as it is, and no hooks around see it."""
    if torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is not None:
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(as_is, as_is)
