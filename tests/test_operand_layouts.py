"""Functions of two large operands, each in any memory layout, in first and later calls, against float64."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ckpt_kernels import functional as F

from .conftest import DEVICE

SHAPE = (4, 8, 5, 8)
CHANNELS, COLUMNS = SHAPE[1], SHAPE[-1]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: random(*SHAPE),
    "channels last": lambda: random(*SHAPE).contiguous(memory_format=torch.channels_last),
    "a half of columns": lambda: random(4, 8, 5, 16)[..., :8],
    "every second column": lambda: random(4, 8, 5, 16)[..., ::2],
    "every second sample": lambda: random(8, 8, 5, 8)[::2],
    "expanded": lambda: random(1, 8, 5, 8).expand(SHAPE),
    "columns swapped": lambda: random(4, 8, 8, 5).transpose(2, 3),
    "samples swapped": lambda: random(8, 4, 5, 8).transpose(0, 1),
}


def normed(x: Tensor, residual: Tensor, activation: str, training: bool = True) -> Tensor:
    mean, var = x.new_zeros(CHANNELS), x.new_ones(CHANNELS)
    return F.batch_norm(x, mean, var, training=training, activation=activation, residual=residual)


FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor | tuple[Tensor, Tensor]]] = {
    "add_layer_norm": lambda x, r: F.add_layer_norm(x, r, COLUMNS, activation="gelu"),
    "add_rms_norm": lambda x, r: F.add_rms_norm(x, r, COLUMNS),
    "gated_rms_norm": lambda x, r: F.gated_rms_norm(x, r, COLUMNS),
    "glu": F.glu,
    "batch_norm, silu": lambda x, r: normed(x, r, "silu"),
    "batch_norm, relu": lambda x, r: normed(x, r, "relu"),
    "batch_norm in evaluation": lambda x, r: normed(x, r, "silu", training=False),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_operands_of_any_layouts(name: str) -> None:
    function = FUNCTIONS[name]

    def results(operands: list[Tensor], turn: int, incoming: list[Tensor]) -> list[Tensor]:
        outputs = function(*operands)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        for output in outputs[len(incoming) :]:
            # In the second call the gradient is in another layout.
            incoming.append(random(*SHAPE) if turn != 1 else LAYOUTS["channels last"]())
            assert output.shape == SHAPE
        gradients = [g.to(o.dtype) for g, o in zip(incoming, outputs, strict=True)]
        return [*outputs, *torch.autograd.grad(outputs, operands, gradients)]

    torch.manual_seed(0)
    for first, second in itertools.product(LAYOUTS, LAYOUTS):
        for turn in range(3):
            operands = [LAYOUTS[layout]().requires_grad_() for layout in (first, second)]
            incoming: list[Tensor] = []
            found = results(operands, turn, incoming)
            truth = results([t.detach().double().requires_grad_() for t in operands], turn, incoming)
            for ours, true in zip(found, truth, strict=True):
                torch.testing.assert_close(ours.double(), true, rtol=1e-4, atol=1e-4, msg=f"{first}, {second}, {turn}")
