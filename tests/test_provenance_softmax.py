"""Casts of a softmax, whose result its node keeps, as in attention that is written out: the casts are not kept."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ckpt_kernels.memory import saved_bytes
from ckpt_kernels.recompute import discard_outputs

from .conftest import DEVICE
from .conversion import random_tensor

BATCH, HEADS, TOKENS, WIDTH = 2, 3, 32, 8


def cast(scores: Tensor) -> Tensor:
    return torch.softmax(scores, -1, dtype=torch.float32).to(scores.dtype)


def written(scores: Tensor) -> Tensor:
    """The cast weights are not those that the node keeps."""
    weights = torch.softmax(scores, -1, dtype=torch.float32)
    with torch.no_grad():
        weights.detach().mul_(0.5)
    return weights.to(scores.dtype)


def attention(weights_of: Callable[[Tensor], Tensor], *operands: Tensor) -> Tensor:
    scores, values = operands
    return weights_of(scores) @ values


def given() -> tuple[Tensor, Tensor]:
    shapes = ((BATCH, HEADS, TOKENS, TOKENS), (BATCH, HEADS, TOKENS, WIDTH))
    scores, values = (random_tensor(*shape, dtype=torch.bfloat16).requires_grad_() for shape in shapes)
    return scores, values


def test_the_softmax_is_kept_once() -> None:
    operands = given()
    eager, discarded = (
        saved_bytes(call, cast, *operands) - operands[1].nbytes for call in (attention, discard_outputs()(attention))
    )
    # Four bytes for an element of the softmax, and two for one of the copy.
    elements = operands[0].numel()
    assert (eager, discarded) == (6 * elements, 4 * elements)
    found, expected = (
        torch.autograd.grad(call(cast, *operands).float().square().sum(), operands)
        for call in (discard_outputs()(attention), attention)
    )
    assert all(map(torch.equal, found, expected))


def test_a_write_to_the_softmax_is_detected() -> None:
    """The cast weights are kept; the node's own result is an error, as in eager torch."""
    operands = given()
    values = operands[1].detach().requires_grad_()
    scores = operands[0].detach()
    for call in (attention, discard_outputs()(attention)):
        with pytest.raises(RuntimeError, match=r"in-?place operation"):
            call(written, operands[0], values).sum().backward()
    found, expected = (
        torch.autograd.grad(call(written, scores, values).float().square().sum(), values)
        for call in (discard_outputs()(attention), attention)
    )
    assert torch.equal(*found, *expected) and found[0].device.type == DEVICE
