"""Layers of real networks keep the floors that docs/recomputation.md derives, and gradients are the same bits."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import ckpt_kernels.nn as ours
from benchmarks.networks import LEVELS, Bottleneck, GPT2Layer, LlamaLayer, UNetBlock, runner
from ckpt_kernels.memory import saved_bytes

from .conftest import DEVICE

WIDTH, TOKENS = 256, 128


def kept(module: nn.Module, level: str, *inputs: torch.Tensor) -> int:
    return saved_bytes(runner(module, level), *inputs, parameters_of=module)


def image(channels: int) -> torch.Tensor:
    x = torch.randn(2, channels, 16, 16, device=DEVICE)
    return x.to(memory_format=torch.channels_last).requires_grad_()


def text(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(2, TOKENS, WIDTH, device=DEVICE).to(dtype).requires_grad_()


def chain(level: str) -> nn.Module:
    """Three bottlenecks, and a convolution that reads the last one."""
    return nn.Sequential(*(Bottleneck(16, level) for _ in range(3)), nn.Conv2d(64, 4, 1, bias=False))


# The kept tensors at each level, in units of (tokens, width), or of the narrow feature maps of a bottleneck. "few"
# bounds the statistics of rows or channels, which are kept too.
HIDDEN = int(2.69 * WIDTH)
LLAMA = {"output": 6 + 2 * HIDDEN / WIDTH, "all": 6.0, "layer": 2.0}
GPT2 = {"output": 10.0, "all": 6.0, "layer": 2.0}
CASES = [
    (lambda level: LlamaLayer(WIDTH, 4, HIDDEN, TOKENS, level), lambda: (text(torch.bfloat16),), 1, LLAMA, 0.08),
    (lambda level: GPT2Layer(WIDTH, 4, level), lambda: (text(torch.float32),), 1, GPT2, 0.08),
    (chain, lambda: (image(64),), 1 / 4, {"output": 4 + 3 * 6, "all": 4 + 3 * 6, "layer": 6}, 0.4),
    (lambda level: UNetBlock(64, level), lambda: (image(64), torch.randn(2, 64, device=DEVICE)), 1, {"output": 2}, 0.1),
]

by_layer = pytest.mark.parametrize("make,inputs,unit,floors,few", CASES, ids=["Llama", "GPT-2", "ResNet", "UNet"])


@by_layer
def test_layers_keep_their_floor(make: Callable, inputs: Callable, unit: float, floors: dict, few: float) -> None:
    x = inputs()
    for level, floor in floors.items():
        module = make(level).to(DEVICE, x[0].dtype)
        units = kept(module, level, *x) / (x[0].nbytes * unit)
        assert floor <= units <= floor + few, level


@by_layer
def test_every_level_gives_the_same_bits(
    make: Callable, inputs: Callable, unit: float, floors: dict, few: float
) -> None:
    x = inputs()
    results = {}
    for level in LEVELS[1:]:
        torch.manual_seed(0)
        module = make(level).to(DEVICE, x[0].dtype)
        output = runner(module, level)(*x)
        results[level] = [output, *torch.autograd.grad(output.float().square().sum(), [x[0], *module.parameters()])]
    for level in LEVELS[2:]:
        for found, expected in zip(results[level], results["block"], strict=True):
            assert torch.equal(found, expected), level


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("level,beyond", [("output", (4, 8)), ("all", (0, 0))])
def test_tensors_kept_beyond_the_blocks_input(level: str, beyond: tuple[int, int], bias: bool) -> None:
    """A norm and an MLP with dropout, whose inner width is four times the width."""
    x = torch.randn(64, 32, device=DEVICE, requires_grad=True)
    plain = nn.Sequential(ours.LayerNorm(32), ours.MLP(32, 128, bias=bias, dropout=0.1, recompute=level)).to(DEVICE)
    gated = nn.Sequential(ours.RMSNorm(32), ours.GatedMLP(32, 128, bias=bias, dropout=0.1, recompute=level)).to(DEVICE)
    for module, units, statistics in ((plain, beyond[0], 2), (gated, beyond[1], 1)):
        assert kept(module, level, x) == (1 + units) * x.nbytes + statistics * 64 * 4
