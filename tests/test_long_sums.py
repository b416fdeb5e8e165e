"""Sums over long rows, and over many rows, are as exact as eager torch's."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor

from ckpt_kernels import functional as F

from .conftest import DEVICE

LONG, MANY = 1 << 20, 1 << 19
Block = Callable[..., Tensor]


def relative_error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).square().mean().sqrt() / truth.square().mean().sqrt())


def assert_as_exact_as_eager(ours: Block, eager: Block, tensors: list[Tensor], wanted: list[int]) -> None:
    """Asserts that output and the wanted gradients have at most 1.5 times eager's error, plus one ulp."""

    def results(block: Block, dtype: torch.dtype) -> list[Tensor]:
        operands = [t.to(dtype).requires_grad_(i in wanted) for i, t in enumerate(tensors)]
        output = block(*operands)
        generator = torch.Generator(DEVICE).manual_seed(1)
        incoming = torch.rand(output.shape, generator=generator, device=DEVICE).to(dtype)
        return [output.detach(), *torch.autograd.grad(output, [operands[i] for i in wanted], incoming)]

    truth = results(eager, torch.float64)
    pairs = zip(results(ours, torch.float32), results(eager, torch.float32), truth, strict=True)
    for found, theirs, true in pairs:
        allowed = 1.5 * relative_error(theirs, true) + torch.finfo(torch.float32).eps
        assert relative_error(found, true) <= allowed


@pytest.mark.parametrize("mean", [0.0, 1000.0])
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_long_rows(norm: str, mean: float) -> None:
    x = torch.randn(1, LONG, generator=torch.Generator().manual_seed(0)).to(DEVICE) + mean
    ours = (lambda x: F.layer_norm(x, LONG)) if norm == "layer_norm" else (lambda x: F.rms_norm(x, LONG, eps=1e-6))
    theirs = (
        (lambda x: TF.layer_norm(x, (LONG,))) if norm == "layer_norm" else (lambda x: TF.rms_norm(x, (LONG,), eps=1e-6))
    )
    assert_as_exact_as_eager(ours, theirs, [x], [0])


BLOCKS: dict[str, tuple[Block, Block]] = {
    "layer_norm": (lambda x, w, b: F.layer_norm(x, 4, w, b), lambda x, w, b: TF.layer_norm(x, (4,), w, b)),
    "rms_norm": (lambda x, w, b: F.rms_norm(x, 4, w, eps=1e-6) + b, lambda x, w, b: TF.rms_norm(x, (4,), w, 1e-6) + b),
    "bias_act": (lambda x, w, b: F.bias_act(x, b, activation="silu") * w, lambda x, w, b: TF.silu(x + b) * w),
    "dyt": (lambda x, w, b: F.dyt(x, w[:1], b), lambda x, w, b: torch.tanh(w[:1] * x) * b),
}


@pytest.mark.parametrize("block", BLOCKS)
def test_many_rows(block: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.rand(shape, generator=generator).to(DEVICE) + 0.5 for shape in ((MANY, 4), (4,), (4,)))
    assert_as_exact_as_eager(*BLOCKS[block], [x, w, b], [1, 2])


def test_an_infinite_gradient_spreads_over_the_row_as_in_eager() -> None:
    x = torch.randn(1, 2048, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    incoming = torch.ones_like(x)
    incoming[0, 0] = float("inf")
    gradients = []
    for block in (F.rms_norm, TF.rms_norm):
        operand = x.clone().requires_grad_()
        gradients += torch.autograd.grad(block(operand, (2048,)), operand, incoming)
    found, expected = (gradient.isnan() for gradient in gradients)
    assert torch.equal(found[0, 1:], expected[0, 1:])
