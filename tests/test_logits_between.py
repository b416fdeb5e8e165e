"""Logits that are computed late, with a model's own code between the head and the loss: gradients are those of the
forward pass."""

import copy

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import ckpt_kernels

from .conftest import DEVICE
from .test_logits import CLASSES, COLUMNS, Model, Shared


def pair() -> tuple[Model, Model, Tensor, Tensor]:
    """A model, a copy with late logits, an input, and targets."""
    torch.manual_seed(0)
    eager = Model(lambda logits, _: logits).to(DEVICE)
    ours = copy.deepcopy(eager)
    ckpt_kernels.convert(ours, logits="head")
    return eager, ours, torch.randn(6, COLUMNS, device=DEVICE), torch.randint(CLASSES, (6,), device=DEVICE)


def test_logits_without_a_gradient_are_plain_tensors() -> None:
    _, ours, x, target = pair()
    with torch.no_grad():
        logits = ours(x, target)
    assert type(logits) is Tensor and not functional.cross_entropy(logits, target).requires_grad
    later = ours(x, target)
    with torch.no_grad():
        scaled = later * 2
    assert not functional.cross_entropy(scaled, target).requires_grad
    for parameter in ours.parameters():
        parameter.requires_grad_(False)
    assert type(ours(x, target)) is Tensor


class Doubled(torch.autograd.Function):
    """A head that is called within a user's function, whose backward pass has another gradient."""

    @staticmethod
    def forward(ctx, hidden, head):
        ctx.head = head
        return head(hidden)

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad @ ctx.head.weight, None


# Code of a model between the hidden states and the loss.
BETWEEN = {
    "a function's own gradient": lambda m, h, t: functional.cross_entropy(Doubled.apply(h, m.head), t),
    "reentrant checkpoint": lambda m, h, t: functional.cross_entropy(
        checkpoint(m.head, h, use_reentrant=True), t
    ) + checkpoint(m.head, h, use_reentrant=True).sum(),
    "checkpoint of a loss": lambda m, h, t: checkpoint(
        lambda z: z.logsumexp(-1).square().mean() + functional.cross_entropy(z, t), m.head(h), use_reentrant=False
    ),
    "frozen before the loss": lambda m, h, t: _frozen_loss(m.head(h), m, t),
    "read in inference mode": lambda m, h, t: _read_in_inference_mode(m.head(h), t),
    "without hooks": lambda m, h, t: _without_hooks(m.head(h), t),
}  # fmt: skip


def _frozen_loss(logits: Tensor, model: Model, target: Tensor) -> Tensor:
    model.head.weight.requires_grad_(False)
    loss = functional.cross_entropy(logits, target)
    model.head.weight.requires_grad_(True)
    return loss


def _read_in_inference_mode(logits: Tensor, target: Tensor) -> Tensor:
    with torch.inference_mode():
        assert not logits.argmax(-1).requires_grad
    return functional.cross_entropy(logits, target)


def _without_hooks(logits: Tensor, target: Tensor) -> Tensor:
    with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
        return functional.cross_entropy(logits, target)


@pytest.mark.parametrize("name", BETWEEN)
def test_gradients_are_those_of_the_forward_pass(name: str) -> None:
    found = []
    for model in pair()[:2]:
        *_, x, target = pair()
        hidden = model.trunk(x)
        BETWEEN[name](model, hidden, target).backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for grad, expected in zip(*reversed(found), strict=True):
        assert (grad is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(grad, expected)


def test_a_weight_that_was_frozen_in_the_forward_has_no_gradient() -> None:
    _, ours, x, target = pair()
    ours.head.weight.requires_grad_(False)
    logits = ours(x, target)
    ours.head.weight.requires_grad_(True)
    functional.cross_entropy(logits, target).backward()
    assert ours.head.weight.grad is None and ours.trunk.weight.grad is not None


def test_a_written_operand_of_a_users_function_is_an_error() -> None:
    _, ours, x, target = pair()
    logits = ours(x, target)
    logits.mul_(3)
    result = Shared.apply(logits)
    with pytest.raises(RuntimeError, match="the gradient of the write would be lost"):
        result.sum().backward()


class Tripled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        ctx.mark_dirty(tensor)
        tensor.mul_(3)
        return tensor

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad


def test_a_function_that_writes_to_logits_is_an_error() -> None:
    _, ours, x, target = pair()
    written = Tripled.apply(ours(x, target))
    with pytest.raises(RuntimeError, match="the gradient of the write would be lost"):
        written.square().sum()


def test_returned_gradients_may_be_written_to() -> None:
    eager, ours, x, target = pair()
    loss = functional.cross_entropy(ours(x, target), target)
    (grad,) = torch.autograd.grad(loss, ours.head.weight, retain_graph=True)
    grad.mul_(3)
    loss.backward()
    functional.cross_entropy(eager(x, target), target).backward()
    torch.testing.assert_close(ours.head.weight.grad, eager.head.weight.grad)


def test_a_failed_loss_leaves_logits_uncomputed() -> None:
    _, ours, x, target = pair()
    logits = ours(x, target)
    # On CUDA a class out of range ends the process.
    if DEVICE == "cpu":
        with pytest.raises(IndexError):
            functional.cross_entropy(logits, target + CLASSES)
    logits.retain_grad()
    with pytest.raises(ValueError, match="is not a valid value for reduction"):
        functional.cross_entropy(logits, target, reduction="all")
    with pytest.raises(TypeError, match="ignore_index"):
        functional.cross_entropy(logits, target, ignore_index=None)
