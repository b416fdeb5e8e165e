"""The maths in plain torch: the specification that the other backends are held to.

The functions named after a block compute it, from (rows, columns) matrices where it goes by rows, and can be
differentiated any number of times. The functions named `*_forward` and `*_backward` are the backend interface, the same
in every backend: they fill tensors that the caller has allocated, and their gradients are written out here. An operand
of None is one the block does not have; a gradient of None is one that nobody wants.
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
    """Why this backend cannot serve such tensors: it always can."""
    return None
