"""Autocast on the device of a tensor. torch has no autocast for meta, and raises an error when asked."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


def is_autocast(tensor: Tensor) -> bool:
    """Whether autocast is enabled for the tensor's device."""
    # The first check is cheap, and avoids naming the device if autocast is enabled nowhere.
    return torch._C._is_any_autocast_enabled() and not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)


@contextlib.contextmanager
def without_shared_casts() -> Iterator[None]:
    """A context in which each op makes its own copies of parameters and other leaves, which autocast else shares."""
    is_sharing = torch._C._is_any_autocast_enabled() and torch.is_autocast_cache_enabled()
    if is_sharing:
        torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        if is_sharing:
            torch.set_autocast_cache_enabled(True)


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager:
    """A context in which ops on the tensor's device have the dtype of their operands."""
    return torch.autocast(tensor.device.type, enabled=False) if is_autocast(tensor) else contextlib.nullcontext()
