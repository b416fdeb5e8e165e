"""Every kernel that the launch tables can choose for rows of one length, with the options that the ops give it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import triton

from .bias_act import bias_act_backward_kernel, bias_act_forward_kernel
from .channel_norm import (
    channel_backward_kernel,
    channel_forward_kernel,
    plane_moments_kernel,
    plane_sums_kernel,
    row_moments_kernel,
    row_sums_kernel,
)
from .glu import glu_backward_kernel, glu_forward_kernel
from .launch import Tile, backward_tile, channel_tile, column_sum_tile, element_tile, forward_tile
from .long_row_norm import long_row_norm_backward_kernel, long_row_norm_forward_kernel
from .row_norm import row_norm_backward_kernel, row_norm_forward_kernel


@dataclass(frozen=True)
class Variant:
    """One kernel with the operands that it does without and its options."""

    name: str
    kernel: triton.JITFunction
    tile: Tile
    absent: Sequence[str]
    options: dict[str, object]


def _row_norm_variants(columns: int) -> Iterator[Variant]:
    defaults = {
        "PRE_ACTIVATION": "identity",
        "ACTIVATION": "identity",
        "GATE_FIRST": False,
        "CAST": False,
        "GIVEN": False,
    }
    for block, options, without, backward_without in (
        ("layer_norm+gelu", {"ACTIVATION": "gelu"}, "RESIDUAL GATE SEED RESIDUAL_OUT", "DH GATE SEED DRESIDUAL DGATE"),
        (
            "silu+rms_norm",
            {"PRE_ACTIVATION": "silu"},
            "RESIDUAL GATE B SEED RESIDUAL_OUT MEAN",
            "DH GATE B SEED MEAN DRESIDUAL DGATE DB",
        ),
        ("add_layer_norm+dropout", {}, "GATE", "GATE DGATE"),
        ("gated_rms_norm", {"ACTIVATION": "silu"}, "RESIDUAL B SEED RESIDUAL_OUT MEAN", "DH B SEED MEAN DRESIDUAL DB"),
    ):
        tile = forward_tile(columns)
        kernel = row_norm_forward_kernel if tile.whole else long_row_norm_forward_kernel
        yield Variant(f"{block} forward", kernel, tile, without.split(), defaults | options)
        if block.startswith("layer_norm"):
            yield Variant(f"{block} again", kernel, tile, without.split(), defaults | options | {"GIVEN": True})
        # A gate is one more operand to hold, and so is the output where it is written again.
        for rewrites in (False, True) if block.startswith("layer_norm") else (False,):
            tile = backward_tile(columns, "GATE" not in without or rewrites)
            kernel = row_norm_backward_kernel if tile.whole else long_row_norm_backward_kernel
            name = f"{block} backward{' and output' if rewrites else ''}"
            absent = [*backward_without.split(), *(() if rewrites else ("Y",))]
            yield Variant(name, kernel, tile, absent, defaults | options)


def _element_variants(columns: int) -> Iterator[Variant]:
    tile = element_tile(columns)
    for turns in (False, True):
        options, name = {"ACTIVATION": "silu", "TURNS": turns}, "interleaved glu" if turns else "glu"
        yield Variant(f"{name} forward", glu_forward_kernel, tile, (), options)
        yield Variant(f"{name} backward", glu_backward_kernel, tile, ("Y",), options)
        yield Variant(f"{name} backward and output", glu_backward_kernel, tile, (), options)
    for name, without in (("bias_act", ("SEED",)), ("bias_act+dropout", ())):
        options, tile = {"ACTIVATION": "gelu"}, element_tile(columns)
        yield Variant(f"{name} forward", bias_act_forward_kernel, tile, without, options)
        tile = column_sum_tile(columns)
        yield Variant(f"{name} backward", bias_act_backward_kernel, tile, (*without, "Y"), options)
        yield Variant(f"{name} backward and output", bias_act_backward_kernel, tile, (*without, "DB"), options)


def _channel_variants(columns: int) -> Iterator[Variant]:
    """Planes of this many elements, and rows of this many channels."""
    for planes in (True, False):
        name = "planes" if planes else "channels last"
        options = {"ACTIVATION": "silu", "BY_SAMPLE": not planes}
        sums_kernel = plane_sums_kernel if planes else row_sums_kernel
        moments_kernel = plane_moments_kernel if planes else row_moments_kernel
        tile = channel_tile(columns, planes)
        yield Variant(f"{name} moments", moments_kernel, tile, (), {})
        yield Variant(f"{name} sums", sums_kernel, tile, ("OTHER",), options | {"BY_OUTPUT": False})
        tile, options = element_tile(columns), options | {"PLANES": planes}
        yield Variant(f"{name} forward", channel_forward_kernel, tile, (), options)
        yield Variant(f"{name} backward", channel_backward_kernel, tile, (), options | {"BY_OUTPUT": True})


def variants(columns: int) -> Iterator[Variant]:
    """All families' kernels for rows of this length: one activation for each place that it can take."""
    yield from _row_norm_variants(columns)
    yield from _element_variants(columns)
    yield from _channel_variants(columns)
