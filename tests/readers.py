"""Readers of a block's output, for the tests of `discard_outputs`, and helpers that compare gradients bit for bit."""

import contextlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ckpt_kernels import functional as F

from .conftest import DEVICE

WIDTH = 16


class Sine(torch.autograd.Function):
    """A user's op that saves its operand."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()


@pytest.fixture(name="p")
def weights() -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.nn.Parameter:
        return torch.nn.Parameter((torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(DEVICE))

    return {
        "norm": random(WIDTH),
        "a": random(WIDTH, WIDTH),
        "b": random(WIDTH, WIDTH),
        "c": random(WIDTH, WIDTH),
        "conv": random(WIDTH, WIDTH, 3),
    }


# Each reads the output n of a norm, of shape (2, 8, WIDTH), and saves n or a part or a view of n.
READERS: dict[str, Callable[[Tensor, dict[str, Tensor]], Tensor]] = {
    "linear": lambda n, p: TF.linear(n, p["a"]),
    "q, k and v": lambda n, p: TF.linear(n, p["a"]) + TF.linear(n, p["b"]) * TF.linear(n, p["c"]).tanh(),
    "convolution": lambda n, p: TF.conv1d(n.transpose(1, 2), p["conv"]),
    "attention": lambda n, p: TF.scaled_dot_product_attention(*[n.view(2, 8, 4, 4).transpose(1, 2)] * 3),
    "einsum": lambda n, p: torch.einsum("btd,de->bte", n, p["a"]),
    "matmul with itself": lambda n, p: n @ n.transpose(1, 2),
    "a slice": lambda n, p: TF.linear(n[:, 2:5, :8].sin(), p["a"][:, :8]),
    "a gather": lambda n, p: n.gather(1, torch.zeros(2, 3, WIDTH, dtype=torch.long, device=n.device)).square(),
    "an index": lambda n, p: n[:, [0, 0, 3]].pow(3),
    "another's function": lambda n, p: Sine.apply(n),
    "itself in a product": lambda n, p: n * n.exp(),
    "a checkpoint": lambda n, p: checkpoint(
        lambda z: TF.linear(F.rms_norm(z, WIDTH, p["norm"]), p["b"]).tanh(), n, use_reentrant=False
    ),
    "further blocks": lambda n, p: TF.linear(
        F.layer_norm(F.glu(n, F.rms_norm(n, WIDTH, p["norm"])), WIDTH, p["norm"]), p["a"]
    ),
    "a fused mlp": lambda n, p: F.gated_mlp(n, p["a"], p["b"], p["c"]),
    "a fused mlp that recomputes all": lambda n, p: F.mlp(n, p["a"], None, p["b"], None, recompute="all"),
}
by_reader = pytest.mark.parametrize("reader", READERS.values(), ids=READERS)


def loss_of(reader: Callable, p: dict, x: Tensor, around: contextlib.AbstractContextManager) -> Tensor:
    hidden = x * 1.5
    with around:
        return reader(F.rms_norm(hidden, WIDTH, p["norm"], activation="silu"), p).square().sum()


def gradients(reader: Callable, p: dict, around: contextlib.AbstractContextManager, passes: str = "one") -> list:
    x = torch.randn(2, 8, WIDTH, generator=torch.Generator().manual_seed(1)).to(DEVICE).requires_grad_()
    sources = [x, *p.values()]
    loss = loss_of(reader, p, x, around)
    if passes == "retained":
        torch.autograd.grad(loss, sources, retain_graph=True, allow_unused=True)
        torch.autograd.grad(loss, [p["norm"]], retain_graph=True)
    if passes == "double":
        first = torch.autograd.grad(loss, [x, p["norm"]], create_graph=True)
        loss = sum(g.square().sum() for g in first)
    return list(torch.autograd.grad(loss, sources, allow_unused=True))


def assert_same_bits(found: list, expected: list) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
