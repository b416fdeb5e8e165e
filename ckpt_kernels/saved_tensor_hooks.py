"""Helpers for saved-tensor hooks."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor

_STEPS_ASIDE = "_ckpt_steps_aside"
_Pack = TypeVar("_Pack", bound=Callable[..., Any])


def steps_aside(pack: _Pack) -> _Pack:
    """Marks a hook that does not see the tensors that are saved within torch.func's gradients: see
    `recompute.transforms`."""
    setattr(pack, _STEPS_ASIDE, True)
    return pack


def may_step_aside(pack: Any) -> bool:
    """Whether a hook that packs tensors has this mark."""
    return getattr(pack, _STEPS_ASIDE, False) is True


def as_is(tensor: Tensor) -> Tensor:
    """Packs or unpacks a tensor as the tensor itself."""
    return tensor


def without_saved_tensor_hooks() -> AbstractContextManager:
    """A context in which saved tensors are kept as they are, unseen by outer hooks."""
    if torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is not None:
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(as_is, as_is)
