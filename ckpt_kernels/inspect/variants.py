"""The kernels that the launch tables choose for blocks of the catalogue, with the arguments that launchers give them.

Each block runs forward and backward on tensors of torch's meta device. The Triton backend records such launches instead
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

# A prime, so that no size derived from it is a multiple of something by chance.
ROWS = 4099
_HEADS, _LONGEST_HEAD = 9, 1024

# One activation for each place that one can take.
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
# A discarded output of this block is computed again by a forward kernel that reads the statistics.
_REBUILT = "layer_norm+gelu"
# Blocks before a linear layer, whose backward kernels write the output again for the gradient of the layer's weight;
# the columns of the block for one of the input's.
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
        name: of the block and the pass.
        launch: as it was recorded.
        elements: of a large operand.
        columns: of a row as the kernel takes it. A gate of contiguous tensors is one long row.
    """

    name: str
    launch: Launch
    elements: int
    columns: int


def variant(name: str, launch: Launch, columns: int) -> Variant:
    """A recorded launch for rows of so many columns, of which there are 4,099."""
    taken = next((argument.columns for argument in launch.arguments if isinstance(argument, Shape)), columns)
    return Variant(name, launch, ROWS * columns, taken)


def launches(call: Function, operands: Operands) -> dict[str, list[Launch]]:
    """The launches of a forward and a backward pass, without those that add up the programs' shares of sums.

    Args:
        call: a block's function, called with the operands by name.
        operands: tensors of the meta device.

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
    return {name: [one for one in found if one.kernel is not column_sums_kernel] for name, found in passes.items()}


def block_operands(name: str, columns: int, dtype: torch.dtype) -> Operands:
    """Operands of a block of the catalogue on the meta device: 4,099 rows, planes or positions.

    Args:
        name: of the block.
        columns: the length of a row, of a plane, or of a head.
        dtype: of all operands but the tables of a rotation, which models keep in float32.
    """
    block = BY_NAME[name]
    lead = (1, _HEADS, ROWS) if block.tables else (1, ROWS)
    operands = block.empty_operands(lead, columns, dtype, "meta")
    return operands | {table: operands[table].float() for table in block.tables}


def variants(columns: int, dtype: torch.dtype) -> Iterator[Variant]:
    """Every family's kernels for rows of this length, a plane of this many elements or rows of this many channels."""
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
    """Each launch, named by block and pass; where a pass launches several kernels, by the kernel too."""
    for direction, launched in passes.items():
        for one in launched:
            kernel = one.kernel.fn.__name__.removesuffix("_kernel").replace("_", " ")
            yield variant(f"{name} {direction}" + (f", {kernel}" if len(launched) > 1 else ""), one, columns)


def _channels_last(channels: int, dtype: torch.dtype) -> Operands:
    operands = BY_NAME[_CHANNEL_NORM].empty_operands((1, channels), ROWS, dtype, "meta")
    input = torch.empty(1, channels, ROWS, 1, dtype=dtype, device="meta", memory_format=torch.channels_last)
    return operands | {"input": input.requires_grad_()}


def _read_by_linear(**operands: Tensor) -> tuple[Tensor, ...]:
    """A linear layer of a discarded output, whose backward pass begins with the output again."""
    with discard_outputs():
        (output,) = BY_NAME[_REBUILT].call(**operands)
        return (F.linear(output, output.new_empty(1, output.shape[-1]).requires_grad_()),)
