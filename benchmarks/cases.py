"""What is measured: blocks and shapes, with what eager torch would write for them.

Shapes are those of real networks, scaled so that a run stays short: rows of transformers, the inner width of a
Llama-like MLP, the first stage of a ResNet-50, the first blocks of the UNet of Stable Diffusion XL.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ckpt_kernels import functional


@dataclass(frozen=True)
class Setting:
    """One shape, in one memory format; `full` if it is for long runs only."""

    shape: tuple[int, ...]
    channels_last: bool = False
    full: bool = False

    @property
    def label(self) -> str:
        return "x".join(map(str, self.shape)) + (" channels last" if self.channels_last else "")

    @property
    def small(self) -> bool:
        """Too small for anything but the overhead of a call to be seen."""
        return torch.Size(self.shape).numel() < 10_000


@dataclass(frozen=True)
class Case:
    """One block. `ours` and `eager` take the operands in order: `tensors` of the setting's shape, then `parameters`
    vectors; `traffic` is how many tensors of that shape must cross memory in (forward, backward), read or written."""

    family: str
    name: str
    ours: Callable[..., Sequence[Tensor]]
    eager: Callable[..., Sequence[Tensor]]
    cpu: Sequence[Setting]
    gpu: Sequence[Setting]
    tensors: int = 1
    parameters: int = 2
    traffic: tuple[int, int] = (2, 3)
    # The first tensor is twice as wide: it packs two.
    packed: bool = False

    def settings(self, device: str) -> Sequence[Setting]:
        return self.gpu if device == "cuda" else self.cpu

    def operands(self, setting: Setting, dtype: torch.dtype, device: str) -> list[Tensor]:
        def tensor() -> Tensor:
            *lead, last = setting.shape
            value = torch.randn(*lead, 2 * last if self.packed else last, device=device).to(dtype)
            if setting.channels_last:
                value = value.to(memory_format=torch.channels_last)
            return value.requires_grad_()

        length = setting.shape[1] if len(setting.shape) == 4 else setting.shape[-1]
        vectors = [torch.nn.Parameter(torch.randn(length, device=device).to(dtype) + 1) for _ in range(self.parameters)]
        return [*(tensor() for _ in range(self.tensors)), *vectors]


SMALL = Setting((8, 64))
ROWS_CPU = (Setting((4096, 1024)), Setting((2048, 4096), full=True), SMALL)
ROWS_GPU = tuple(
    Setting(shape) for shape in ((16384, 512), (16384, 1024), (16384, 4096), (8192, 8192), (4096, 16384), (2048, 32768))
)
WIDE_CPU = (Setting((4096, 2816)),)
WIDE_GPU = (Setting((8192, 14336)),)


def _images(*shape: int) -> tuple[Setting, Setting]:
    return Setting(shape), Setting(shape, channels_last=True)


def _layer_norm(activation: str, eager_activation: Callable[[Tensor], Tensor]) -> Case:
    return Case(
        "row norms",
        "layer_norm" + ("" if activation == "identity" else f"+{activation}"),
        lambda x, w, b: (functional.layer_norm(x, w.shape, w, b, activation=activation),),
        lambda x, w, b: (eager_activation(F.layer_norm(x, w.shape, w, b)),),
        ROWS_CPU,
        (*ROWS_GPU, SMALL),
    )


def _rms_norm(activation: str, eager_activation: Callable[[Tensor], Tensor]) -> Case:
    return Case(
        "row norms",
        "rms_norm" + ("" if activation == "identity" else f"+{activation}"),
        lambda x, w: (functional.rms_norm(x, w.shape, w, 1e-6, activation=activation),),
        lambda x, w: (eager_activation(F.rms_norm(x, w.shape, w, 1e-6)),),
        ROWS_CPU,
        (*ROWS_GPU, SMALL),
        parameters=1,
    )


def _eager_add_rms_norm(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    total = residual + x
    return F.rms_norm(total, w.shape, w, 1e-6), total


def _eager_packed_glu(packed: Tensor) -> tuple[Tensor]:
    gate, value = packed.chunk(2, -1)
    return (F.silu(gate) * value,)


def _batch_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, w, b, training=True)


CASES = (
    _layer_norm("identity", lambda y: y),
    _layer_norm("gelu", F.gelu),
    _layer_norm("gelu_tanh", lambda y: F.gelu(y, approximate="tanh")),
    _rms_norm("identity", lambda y: y),
    _rms_norm("silu", F.silu),
    Case(
        "row norms",
        "add_rms_norm",
        lambda x, r, w: functional.add_rms_norm(x, r, w.shape, w, 1e-6),
        _eager_add_rms_norm,
        ROWS_CPU,
        (*ROWS_GPU, SMALL),
        tensors=2,
        parameters=1,
        traffic=(4, 4),
    ),
    Case(
        "gates and biases",
        "glu (silu)",
        lambda gate, value: (functional.glu(gate, value),),
        lambda gate, value: (F.silu(gate) * value,),
        WIDE_CPU,
        WIDE_GPU,
        tensors=2,
        parameters=0,
        traffic=(3, 5),
    ),
    Case(
        "gates and biases",
        "packed_glu (silu)",
        lambda packed: (functional.packed_glu(packed),),
        _eager_packed_glu,
        WIDE_CPU,
        WIDE_GPU,
        parameters=0,
        traffic=(3, 5),
        packed=True,
    ),
    Case(
        "gates and biases",
        "bias_act (gelu)",
        lambda x, b: (functional.bias_act(x, b, activation="gelu"),),
        lambda x, b: (F.gelu(x + b),),
        WIDE_CPU,
        WIDE_GPU,
        parameters=1,
    ),
    Case(
        "gates and biases",
        "bias_act (gelu, dropout)",
        lambda x, b: (functional.bias_act(x, b, activation="gelu", dropout_p=0.1),),
        lambda x, b: (F.dropout(F.gelu(x + b), 0.1),),
        WIDE_CPU,
        WIDE_GPU,
        parameters=1,
    ),
    Case(
        "channel norms",
        "batch_norm+relu",
        lambda x, w, b: (functional.batch_norm(x, None, None, w, b, True, activation="relu"),),
        lambda x, w, b: (F.relu(_batch_norm(x, w, b)),),
        _images(8, 64, 56, 56),
        _images(64, 256, 56, 56),
        traffic=(3, 5),
    ),
    Case(
        "channel norms",
        "batch_norm+add+relu",
        lambda x, r, w, b: (functional.batch_norm(x, None, None, w, b, True, activation="relu", residual=r),),
        lambda x, r, w, b: (F.relu(_batch_norm(x, w, b) + r),),
        _images(8, 64, 56, 56),
        _images(64, 256, 56, 56),
        tensors=2,
        traffic=(4, 8),
    ),
    Case(
        "channel norms",
        "group_norm+silu",
        lambda x, w, b: (functional.group_norm(x, 32, w, b, activation="silu"),),
        lambda x, w, b: (F.silu(F.group_norm(x, 32, w, b)),),
        _images(2, 320, 64, 64),
        _images(16, 320, 64, 64),
        traffic=(3, 5),
    ),
)
