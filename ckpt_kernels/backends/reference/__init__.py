"""The reference backend: the maths in plain torch, which specifies the results of all other backends.

A function named after a block computes the block and can be differentiated any number of times; row blocks take
(rows, columns) matrices. The functions named `*_forward` and `*_backward` are the interface that every backend has:
they fill tensors that the caller has allocated, and the backward functions write the gradients out. An operand is None
if the block does not have that operand, and a gradient is None if the gradient is not needed.
"""

import torch

from .channel_norm import (
    channel_backward,
    channel_backward_coefficients,
    channel_coefficients,
    channel_forward,
    channel_moments,
    channel_norm,
    channel_statistics,
    channel_sums,
)
from .common import ACTIVATIONS, SLOPES, compute_dtype, dropout, gradients, philox_bits, slope
from .elementwise import (
    bias_act,
    bias_act_backward,
    bias_act_forward,
    dyt,
    dyt_backward,
    dyt_forward,
    glu,
    glu_backward,
    glu_forward,
)
from .rotary import rotary, rotary_backward, rotary_forward, rotary_table_gradients, rotated_back
from .row_norm import row_norm, row_norm_backward, row_norm_forward

__all__ = [
    "ACTIVATIONS",
    "SLOPES",
    "bias_act",
    "bias_act_backward",
    "bias_act_forward",
    "channel_backward",
    "channel_backward_coefficients",
    "channel_coefficients",
    "channel_forward",
    "channel_moments",
    "channel_norm",
    "channel_statistics",
    "channel_sums",
    "compute_dtype",
    "dropout",
    "dyt",
    "dyt_backward",
    "dyt_forward",
    "glu",
    "glu_backward",
    "glu_forward",
    "gradients",
    "philox_bits",
    "rotary",
    "rotary_backward",
    "rotary_forward",
    "rotary_table_gradients",
    "rotated_back",
    "row_norm",
    "row_norm_backward",
    "row_norm_forward",
    "slope",
    "why_not",
]


def why_not(device_type: str, dtype: torch.dtype) -> str | None:
    """Return None: this backend serves every device and dtype."""
    return None
