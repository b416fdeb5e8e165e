"""What is measured: blocks and shapes, with what eager torch would write for them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ckpt_kernels import functional


@dataclass(frozen=True)
class Case:
    """One block. `ours` and `eager` take the operands in order; `traffic` is the tensors of the input's size that
    must cross memory in (forward, backward), read or written."""

    name: str
    ours: Callable[..., Sequence[Tensor]]
    eager: Callable[..., Sequence[Tensor]]
    rows: int = 1
    bias: bool = True
    traffic: tuple[int, int] = (2, 3)

    def operands(self, rows: int, columns: int, dtype: torch.dtype, device: str) -> list[Tensor]:
        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device=device).to(dtype).requires_grad_()

        coefficients = [torch.nn.Parameter(random(columns).detach() + 1)]
        if self.bias:
            coefficients.append(torch.nn.Parameter(random(columns).detach()))
        return [random(rows, columns) for _ in range(self.rows)] + coefficients


def _layer_norm(activation: str, eager_activation: Callable[[Tensor], Tensor]) -> Case:
    return Case(
        "layer_norm" + ("" if activation == "identity" else f"+{activation}"),
        lambda x, w, b: (functional.layer_norm(x, w.shape, w, b, activation=activation),),
        lambda x, w, b: (eager_activation(F.layer_norm(x, w.shape, w, b)),),
    )


def _rms_norm(activation: str, eager_activation: Callable[[Tensor], Tensor]) -> Case:
    return Case(
        "rms_norm" + ("" if activation == "identity" else f"+{activation}"),
        lambda x, w: (functional.rms_norm(x, w.shape, w, 1e-6, activation=activation),),
        lambda x, w: (eager_activation(F.rms_norm(x, w.shape, w, 1e-6)),),
        bias=False,
    )


def _eager_add_rms_norm(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    total = residual + x
    return F.rms_norm(total, w.shape, w, 1e-6), total


CASES = (
    _layer_norm("identity", lambda y: y),
    _layer_norm("gelu", F.gelu),
    _layer_norm("gelu_tanh", lambda y: F.gelu(y, approximate="tanh")),
    _rms_norm("identity", lambda y: y),
    _rms_norm("silu", F.silu),
    Case(
        "add_rms_norm",
        lambda x, r, w: functional.add_rms_norm(x, r, w.shape, w, 1e-6),
        _eager_add_rms_norm,
        rows=2,
        bias=False,
        traffic=(4, 4),
    ),
)

CPU_SHAPES = ((4096, 1024), (2048, 4096))
GPU_SHAPES = ((16384, 512), (16384, 1024), (16384, 4096), (8192, 8192), (4096, 16384), (2048, 32768))
SMALL_SHAPE = (8, 64)
