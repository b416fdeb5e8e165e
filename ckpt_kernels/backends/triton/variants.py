"""Enumerates every kernel that the launchers can choose for rows of one length, with the arguments of the launch.

The backend is called with tensors on torch's meta device, whose launches are recorded instead of run.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..blocks import Rotary, RotaryGradients, RotaryOptions, RowNorm, RowNormGradients, RowNormOptions
from . import launch
from .bias_act import bias_act_backward, bias_act_forward
from .channel_norm import channel_backward, channel_forward, channel_moments, channel_sums
from .dyt import dyt_backward, dyt_forward
from .glu import glu_backward, glu_forward
from .rotary import rotary_backward, rotary_forward
from .row_norm import row_norm_backward, row_norm_forward
from .sums import column_sums_kernel

# A prime, so that no derived size is a multiple of 16 by chance, which Triton would specialize on.
ROWS = 4099
# The number of heads that share a row of the tables, and the longest heads in models.
_HEADS, _HEAD_COLUMNS = 9, 1024


class Variant(NamedTuple):
    """One kernel with the arguments of a launch; `elements` is the size of a large operand."""

    name: str
    launch: launch.Launch
    elements: int


def _variants(name: str, columns: int, call: Callable[..., None], *arguments: object) -> Iterator[Variant]:
    """Yield each kernel that a call launches. A second kernel computes sums that the first had no registers for."""
    launch.recorded.clear()
    call(*arguments)
    # The addition of partial sums is left out, because its operands are small.
    launched = [one for one in launch.recorded if one.kernel is not column_sums_kernel]
    for suffix, one in zip(("", ", sums apart")[: len(launched)], launched, strict=True):
        yield Variant(name + suffix, one, ROWS * columns)


def meta_tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _row_norms(columns: int, dtype: torch.dtype) -> Iterator[Variant]:
    x, w, mean = meta_tensor(ROWS, columns, dtype=dtype), meta_tensor(columns, dtype=dtype), meta_tensor(ROWS)
    dw, seed = meta_tensor(columns), meta_tensor(1, dtype=torch.int64)
    centered, plain = RowNormOptions(columns, 1e-5, True), RowNormOptions(columns, 1e-5, False)
    gelu, pre = centered._replace(activation="gelu"), plain._replace(pre_activation="silu")
    gated, dropped = plain._replace(activation="silu"), centered._replace(dropout_p=0.5)
    nothing = (None,) * 3
    for name, block, gradients in (
        ("layer_norm+gelu", RowNorm(x, None, None, w, w, None, mean, mean, gelu), (x, None, None, dw, dw)),
        ("silu+rms_norm", RowNorm(x, None, None, w, None, None, None, mean, pre), (x, None, None, dw, None)),
        (
            "add_layer_norm+dropout",
            RowNorm(x, x, None, w, w, seed, mean, mean, dropped),
            (x, x, None, dw, dw),
        ),
        ("gated_rms_norm", RowNorm(x, None, x, w, *nothing, mean, gated), (x, None, x, dw, None)),
    ):
        has_residual, rewritten = block.residual is not None, name == "layer_norm+gelu"
        total = x if has_residual else None
        yield from _variants(f"{name} forward", columns, row_norm_forward, block, x, total)
        if rewritten:
            yield from _variants(f"{name} again", columns, row_norm_forward, block, x, total, True)
        kept, arguments = block._replace(residual=None), (x, total, RowNormGradients(*gradients))
        yield from _variants(f"{name} backward", columns, row_norm_backward, kept, *arguments)
        if rewritten:
            yield from _variants(f"{name} backward and output", columns, row_norm_backward, kept, *arguments, x)


def _elementwise(columns: int, dtype: torch.dtype) -> Iterator[Variant]:
    x, packed = meta_tensor(ROWS, columns, dtype=dtype), meta_tensor(ROWS, 2 * columns, dtype=dtype)
    for name, gate, value in (("glu", x, x), ("interleaved glu", packed[:, ::2], packed[:, 1::2])):
        yield from _variants(f"{name} forward", columns, glu_forward, gate, value, x, "silu")
        yield from _variants(f"{name} backward", columns, glu_backward, x, gate, value, gate, value, None, "silu")
        yield from _variants(
            f"{name} backward and output", columns, glu_backward, x, gate, value, gate, value, x, "silu"
        )
    bias, seed = meta_tensor(columns, dtype=dtype), meta_tensor(1, dtype=torch.int64)
    for name, dropout_seed, p in (("bias_act", None, 0.0), ("bias_act+dropout", seed, 0.5)):
        yield from _variants(f"{name} forward", columns, bias_act_forward, x, bias, dropout_seed, x, "gelu", p)
        backward = (bias_act_backward, x, x, bias, dropout_seed, x)
        yield from _variants(f"{name} backward", columns, *backward, meta_tensor(columns), None, "gelu", p)
        yield from _variants(f"{name} backward and output", columns, *backward, None, x, "gelu", p)
    alpha, dw = meta_tensor(1, dtype=dtype), meta_tensor(columns)
    yield from _variants("dyt forward", columns, dyt_forward, x, alpha, bias, bias, x)
    yield from _variants("dyt backward", columns, dyt_backward, x, x, alpha, bias, x, meta_tensor(1), dw, dw)


def _channel_norms(columns: int, dtype: torch.dtype) -> Iterator[Variant]:
    """Yield the channel norms of planes with `columns` elements, and of rows with `columns` channels."""
    x = meta_tensor(ROWS, columns, dtype=dtype)
    for name, planes in (("planes", True), ("channels last", False)):
        # One sample of ROWS channels, or of ROWS rows.
        channels = ROWS if planes else columns
        sums, coefficients = meta_tensor(1, 1 if planes else 65, channels), meta_tensor(6, 1 if planes else 2, channels)
        yield from _variants(f"{name} moments", columns, channel_moments, x, sums, sums, planes, 64)
        reduction = (channel_sums, x, x, None, coefficients, sums, sums)
        yield from _variants(f"{name} sums", columns, *reduction, planes, 64, "silu", False)
        yield from _variants(f"{name} forward", columns, channel_forward, x, x, coefficients, x, planes, 1, "silu")
        backward = (channel_backward, x, x, x, coefficients, x, x)
        yield from _variants(f"{name} backward", columns, *backward, planes, 1, "silu", True)


def _rotaries(columns: int, dtype: torch.dtype) -> Iterator[Variant]:
    """Yield the rotary kernels of fully rotated heads, with float32 tables that have one entry a pair."""
    x, table = meta_tensor(1, ROWS, _HEADS, columns, dtype=dtype), meta_tensor(1, ROWS, 1, columns // 2)
    w, dw = meta_tensor(columns, dtype=dtype), meta_tensor(columns)
    for name, options, norm, sums in (
        ("rotary", RotaryOptions(columns), (None, None), (None, None)),
        ("rotary (interleaved)", RotaryOptions(columns, 0, True, True), (None, None), (None, None)),
        ("rms_norm+rotary", RotaryOptions(columns, norm="rms", eps=1e-6), (w, None), (dw, None)),
        (
            "layer_norm+rotary (interleaved)",
            RotaryOptions(columns, 0, True, True, norm="layer", eps=1e-6),
            (w, w),
            (dw, dw),
        ),
    ):
        block = Rotary(x, table, table, *norm, options)
        yield from _variants(f"{name} forward", columns, rotary_forward, block, x)
        kept = block._replace(input=None) if options.norm == "none" else block
        yield from _variants(f"{name} backward", columns, rotary_backward, kept, x, RotaryGradients(x, *sums))


def variants(columns: int, dtype: torch.dtype) -> Iterator[Variant]:
    """Yield the kernels of all families for rows of this length, with one activation at each place of an activation."""
    yield from _row_norms(columns, dtype)
    yield from _elementwise(columns, dtype)
    yield from _channel_norms(columns, dtype)
    if columns <= _HEAD_COLUMNS:
        yield from _rotaries(columns, dtype)
