"""The benchmark cases: blocks of the catalogue, and their shapes.

Shapes are those of real networks, scaled so that a run stays short: rows of transformers, the inner width of a
Llama-like MLP, heads of attention, the first stage of a ResNet-50, the first blocks of the UNet of Stable Diffusion XL.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ckpt_kernels.catalogue import blocks
from ckpt_kernels.catalogue.block import Block, Operands


@dataclass(frozen=True)
class Setting:
    """A shape in a memory format. With `full`, only long runs measure the shape."""

    shape: tuple[int, ...]
    channels_last: bool = False
    full: bool = False

    @property
    def label(self) -> str:
        return "x".join(map(str, self.shape)) + (" channels last" if self.channels_last else "")

    @property
    def small(self) -> bool:
        """Whether the shape is so small that the time is only the overhead of a call."""
        return torch.Size(self.shape).numel() < 10_000


@dataclass(frozen=True)
class Case:
    """A block and its settings. `traffic` counts the tensors of a setting's shape that cross memory in each pass."""

    family: str
    block: Block
    cpu: Sequence[Setting]
    gpu: Sequence[Setting]

    @property
    def name(self) -> str:
        return self.block.name

    @property
    def traffic(self) -> tuple[int, int]:
        return sum(self.block.forward), sum(self.block.backward)

    def settings(self, device: str) -> Sequence[Setting]:
        return self.gpu if device == "cuda" else self.cpu

    def operands(self, setting: Setting, dtype: torch.dtype, device: str) -> Operands:
        *lead, columns = setting.shape
        found = self.block.operands(lead, columns, dtype, device)
        if not setting.channels_last:
            return found
        images = {name: found[name].detach().to(memory_format=torch.channels_last) for name in self.block.rows}
        return found | {name: image.requires_grad_() for name, image in images.items()}


SMALL = Setting((8, 64))
ROWS_CPU = (Setting((4096, 1024)), Setting((2048, 4096), full=True), SMALL)
ROWS_GPU = tuple(
    Setting(shape) for shape in ((16384, 512), (16384, 1024), (16384, 4096), (8192, 8192), (4096, 16384), (2048, 32768))
)


def _images(*shape: int) -> tuple[Setting, Setting]:
    return Setting(shape), Setting(shape, channels_last=True)


# Blocks that the catalogue does not have.
_BLOCKS = blocks.BY_NAME | {"packed_glu (silu)": blocks.packed_glu("packed_glu (silu)", activation="silu")}
_FAMILIES = (
    (
        "row norms",
        ROWS_CPU,
        (*ROWS_GPU, SMALL),
        ("layer_norm", "layer_norm+gelu", "layer_norm+gelu_tanh", "rms_norm", "rms_norm+silu", "add_rms_norm"),
    ),
    (
        "gates and biases",
        (Setting((4096, 2816)),),
        (Setting((8192, 14336)),),
        ("glu (silu)", "packed_glu (silu)", "bias_act (gelu)", "bias_act (gelu, dropout)", "dyt"),
    ),
    # Queries of Llama-3 and Qwen3 with 8 billion parameters, and of Flux.
    (
        "rotations",
        (Setting((2, 32, 512, 128)), Setting((1, 24, 1024, 128), full=True), SMALL),
        (Setting((4, 32, 4096, 128)), Setting((2, 24, 4608, 128)), SMALL),
        ("rotary", "rotary (interleaved)", "rms_norm+rotary"),
    ),
    ("channel norms", _images(8, 64, 56, 56), _images(64, 256, 56, 56), ("batch_norm+relu", "batch_norm+add+relu")),
    ("channel norms", _images(2, 320, 64, 64), _images(16, 320, 64, 64), ("group_norm+silu",)),
)
CASES = tuple(Case(family, _BLOCKS[name], cpu, gpu) for family, cpu, gpu, names in _FAMILIES for name in names)
