"""Autocast as it is for a tensor's device, of which torch may not be asked for every device: it knows none for meta."""

import contextlib

import torch
from torch import Tensor


def is_autocast(tensor: Tensor) -> bool:
    """Whether autocast is enabled for the tensor's device."""
    # Where it is enabled nowhere, which is soon told, the device need not be named.
    return torch._C._is_any_autocast_enabled() and not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Within, operations on the tensor's device have the dtype of their operands."""
    return torch.autocast(tensor.device.type, enabled=False) if is_autocast(tensor) else contextlib.nullcontext()
