"""The Triton backend. With Triton's interpreter (TRITON_INTERPRET=1) it also computes on the CPU, for tests."""

import torch
from triton import knobs

from ..reference import (
    channel_backward_coefficients,
    channel_coefficients,
    channel_statistics,
)
from .bias_act import bias_act_backward, bias_act_forward
from .channel_norm import channel_backward, channel_forward, channel_moments, channel_sums
from .dyt import dyt_backward, dyt_forward
from .glu import glu_backward, glu_forward
from .rotary import rotary_backward, rotary_forward
from .row_norm import row_norm_backward, row_norm_forward

__all__ = [
    "bias_act_backward",
    "bias_act_forward",
    "channel_backward",
    "channel_backward_coefficients",
    "channel_coefficients",
    "channel_forward",
    "channel_moments",
    "channel_statistics",
    "channel_sums",
    "dyt_backward",
    "dyt_forward",
    "glu_backward",
    "glu_forward",
    "rotary_backward",
    "rotary_forward",
    "row_norm_backward",
    "row_norm_forward",
    "why_not",
]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(device_type: str, dtype: torch.dtype) -> str | None:
    """Return the reason why this backend cannot serve a device and dtype, or None."""
    if dtype not in _DTYPES:
        return f"it does not compute in {dtype}"
    if device_type == "meta":
        return None  # Launches with meta tensors are recorded, never run.
    if knobs.runtime.interpret:
        return None if device_type in ("cpu", "cuda") else f"Triton's interpreter does not serve {device_type}"
    if device_type != "cuda":
        return f"Triton has no code generator for {device_type} here (its interpreter does: TRITON_INTERPRET=1)"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (7, 5):
        return "Triton needs a GPU of compute capability 7.5 or newer"
    return None
