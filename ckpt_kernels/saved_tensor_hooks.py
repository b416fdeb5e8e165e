"""Helpers for saved-tensor hooks."""

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def as_is(tensor: Tensor) -> Tensor:
    """Packs or unpacks a tensor as the tensor itself."""
    return tensor


def without_saved_tensor_hooks() -> AbstractContextManager:
    """A context in which saved tensors are kept as they are, unseen by outer hooks."""
    if torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is not None:
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(as_is, as_is)
