"""Enumerates the kernels that the launchers choose for blocks of the catalogue, with the arguments of each launch.

Each block runs forward and backward on tensors on torch's meta device. The Triton backend records such launches instead
of running them.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..backends.triton import launch
from ..backends.triton.glu import Shape
from ..backends.triton.launch import Launch
from ..backends.triton.sums import column_sums_kernel
from ..catalogue.block import Function, Operands
from ..catalogue.blocks import BY_NAME
from ..catalogue.linear import act_linear, gated_mlp, norm_linear, packed_gated_mlp
from ..recompute import discard_outputs

# A prime, so that no derived size is a multiple of 16 by chance, which Triton would specialize on.
ROWS = 4099
_HEADS, _LONGEST_HEAD = 9, 1024

# One activation for each place of an activation.
_BLOCKS = (
    "layer_norm+gelu",
    "silu+rms_norm (offset)",
    "add_layer_norm (dropout)",
    "gated_rms_norm (silu, norm first)",
    "glu (silu)",
    "packed_glu (silu, interleaved)",
    "bias_act (gelu)",
    "bias_act (gelu, dropout)",
    "dyt",
)
_CHANNEL_NORM = "group_norm+silu"
_ROTARIES = ("rotary", "rotary (interleaved)", "rms_norm+rotary", "layer_norm+rotary (interleaved)")
# A forward kernel that reads the statistics recomputes a discarded output of this block.
_REBUILT = "layer_norm+gelu"
# Blocks before a linear layer, whose backward kernels write the output again for the gradient of the layer's weight,
# each with the ratio of the block's columns to the input's.
_BEFORE_LINEAR = (
    (norm_linear("layer_norm+gelu", activation="gelu"), 1),
    (act_linear("bias_act (gelu)", activation="gelu"), 1),
    (act_linear("bias_act (gelu, dropout)", activation="gelu", dropout_p=0.1), 1),
    (gated_mlp("glu (silu)", activation="silu"), 4),
    (packed_gated_mlp("packed_glu (silu, interleaved)", layout="interleaved"), 4),
)


class Variant(NamedTuple):
    """One recorded launch.

    Attributes:
        name: the name of the block and the pass.
        launch: the recorded launch.
        elements: the number of elements of a large operand.
        columns: the columns of a row in the kernel. A glu of contiguous tensors is one long row.
    """

    name: str
    launch: Launch
    elements: int
    columns: int


def variant(name: str, launch: Launch, columns: int) -> Variant:
    """Return the variant of a recorded launch for 4,099 rows of `columns` columns."""
    kernel_columns = next((argument.columns for argument in launch.arguments if isinstance(argument, Shape)), columns)
    return Variant(name, launch, ROWS * columns, kernel_columns)


def launches(call: Function, operands: Operands) -> dict[str, list[Launch]]:
    """Record the launches of a forward and a backward pass, except for those that add up partial sums.

    Args:
        call: a block's function, called with the operands by name.
        operands: tensors on the meta device.

    Returns:
        The launches in order, by pass: "forward" and "backward".
    """
    with backends.serving("triton"):
        with launch.recording() as forward:
            outputs = call(**operands)
        wanted = [operand for operand in operands.values() if operand.requires_grad]
        with launch.recording() as backward:
            torch.autograd.grad(outputs, wanted, [torch.empty_like(output) for output in outputs])
    passes = {"forward": forward, "backward": backward}
    return {name: [one for one in own if one.kernel is not column_sums_kernel] for name, own in passes.items()}


def block_operands(name: str, columns: int, dtype: torch.dtype) -> Operands:
    """Return operands of a block of the catalogue on the meta device: 4,099 rows, planes or positions.

    Args:
        name: the name of the block.
        columns: the length of a row, of a plane, or of a head.
        dtype: the dtype of all operands except the tables of a rotation, which models keep in float32.
    """
    block = BY_NAME[name]
    lead = (1, _HEADS, ROWS) if block.tables else (1, ROWS)
    operands = block.empty_operands(lead, columns, dtype, "meta")
    return operands | {table: operands[table].float() for table in block.tables}


def variants(columns: int, dtype: torch.dtype) -> Iterator[Variant]:
    """Yield the kernels of all families for rows with `columns` columns, planes with as many elements, or channels."""
    for name in (*_BLOCKS, _CHANNEL_NORM, *(_ROTARIES if columns <= _LONGEST_HEAD else ())):
        yield from _variants(name, launches(BY_NAME[name].call, block_operands(name, columns, dtype)), columns)
    name = f"{_CHANNEL_NORM} (channels last)"
    yield from _variants(name, launches(BY_NAME[_CHANNEL_NORM].call, _channels_last(columns, dtype)), columns)
    again = launches(_read_by_linear, block_operands(_REBUILT, columns, dtype))["backward"][:1]
    yield from _variants(_REBUILT, {"again": again}, columns)
    for pair, width in _BEFORE_LINEAR:
        operands = pair.empty_operands((1, ROWS), columns // width, dtype, "meta")
        backward = launches(pair.at("output"), operands)["backward"]
        yield from _variants(pair.name, {"backward and output": backward}, columns)


def _variants(name: str, passes: Mapping[str, list[Launch]], columns: int) -> Iterator[Variant]:
    """Yield each launch, named by block and pass, and by kernel if a pass launches several."""
    for direction, launched in passes.items():
        for one in launched:
            kernel = one.kernel.fn.__name__.removesuffix("_kernel").replace("_", " ")
            yield variant(f"{name} {direction}" + (f", {kernel}" if len(launched) > 1 else ""), one, columns)


def _channels_last(channels: int, dtype: torch.dtype) -> Operands:
    operands = BY_NAME[_CHANNEL_NORM].empty_operands((1, channels), ROWS, dtype, "meta")
    input = torch.empty(1, channels, ROWS, 1, dtype=dtype, device="meta", memory_format=torch.channels_last)
    return operands | {"input": input.requires_grad_()}


def _read_by_linear(**operands: Tensor) -> tuple[Tensor, ...]:
    """Apply a linear layer to a discarded output, which the backward pass recomputes first."""
    with discard_outputs():
        (output,) = BY_NAME[_REBUILT].call(**operands)
        return (F.linear(output, output.new_empty(1, output.shape[-1]).requires_grad_()),)
