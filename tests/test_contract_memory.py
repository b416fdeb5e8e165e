"""Saved bytes of every block equal the floor: the operands that the backward pass needs, and a few bytes a row."""

import pytest
import torch

from ckpt_kernels.catalogue.block import Block
from ckpt_kernels.catalogue.blocks import BY_NAME
from ckpt_kernels.memory import saved_bytes

from .blocks import by_block, with_gradients
from .conftest import DEVICE, emulated, interprets, where

ROWS = (3, 8)
COLUMNS = 96


def statistics_bytes(block: Block, dtype: torch.dtype) -> int:
    return block.statistics(*ROWS) * (8 if dtype == torch.float64 else 4)


# Saved tensors do not depend on the kernel, so one dtype is enough for emulated backends.
@where(lambda backend, dtype: not emulated(backend) or dtype == torch.bfloat16)
@by_block
def test_saved_bytes_are_the_floor(block: Block, served: tuple) -> None:
    _, dtype = served
    operands = block.operands(ROWS, COLUMNS, dtype, DEVICE)
    outputs = block.call(**operands)
    named = operands | {f"output {i}": output for i, output in enumerate(outputs)}
    kept = sum(named[name].nbytes for name in block.kept)
    assert saved_bytes(block.call, **operands) == kept + statistics_bytes(block, dtype)


@by_block
@pytest.mark.parametrize("frozen", ["weights", "activations"])
def test_frozen_operands_never_raise_saved_bytes(block: Block, frozen: str) -> None:
    operands = block.operands(ROWS, COLUMNS, torch.float32, DEVICE)
    everything = saved_bytes(block.call, **operands)
    for name, tensor in operands.items():
        if (name in block.parameters) == (frozen == "weights"):
            tensor.requires_grad_(False)
    assert saved_bytes(block.call, **operands) <= everything


def operands_of(block: Block) -> int:
    return len({*block.rows, *block.coefficients, *block.samples})


# The blocks with four and more operands are enough where kernels are interpreted.
@where(lambda block, backend: not interprets(backend) or operands_of(block) >= 4)
@by_block
def test_each_gradient_alone_is_the_same(block: Block, backend: str) -> None:
    operands = block.operands(ROWS, COLUMNS, torch.float32, DEVICE)
    whole = with_gradients(block.call, operands)
    for name in (name for name, t in operands.items() if t.requires_grad):
        given = {other: t.detach().requires_grad_(other == name) for other, t in operands.items()}
        assert torch.equal(with_gradients(block.call, given)[f"grad {name}"], whole[f"grad {name}"]), name


def test_a_bias_alone_needs_nothing() -> None:
    block = BY_NAME["layer_norm"]
    operands = block.operands(ROWS, COLUMNS, torch.float32, DEVICE)
    for name in ("input", "weight"):
        operands[name].requires_grad_(False)
    assert saved_bytes(block.call, **operands) == 0
    (output,) = block.call(**operands)
    output.sum().backward()
    assert torch.equal(operands["bias"].grad, torch.full_like(operands["bias"], ROWS[0] * ROWS[1]))


@by_block
def test_nothing_is_kept_without_gradients(block: Block) -> None:
    operands = block.operands(ROWS, COLUMNS, torch.float32, DEVICE)
    with torch.no_grad():
        assert saved_bytes(block.call, **operands) == 0
    frozen = {name: t.detach() for name, t in operands.items()}
    assert saved_bytes(block.call, **frozen) == 0


def test_saved_bytes_counts_storages_once_and_whole() -> None:
    x = torch.randn(10, 4, requires_grad=True)
    assert saved_bytes(lambda: x[:5].exp()) == 5 * 4 * 4
    assert saved_bytes(lambda: (x * x.t().t()).sum()) == 10 * 4 * 4
    linear = torch.nn.Linear(4, 4)
    assert saved_bytes(linear, x) == x.nbytes
    assert saved_bytes(lambda: torch.nn.functional.linear(x, linear.weight)) == x.nbytes
