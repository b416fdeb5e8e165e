"""Attention as a user's `autograd.Function` or custom op: a layer keeps the output that the op saves, once."""

import contextlib
import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor

from ckpt_kernels.memory import saved_bytes
from ckpt_kernels.recompute import layer

from .conftest import DEVICE
from .test_layer import HEADS, TOKENS, assert_same_bits, backward_ops, gradients, made


def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the logsumexp of each row of scores."""
    scores = q @ k.transpose(-1, -2)
    total = scores.logsumexp(-1, keepdim=True)
    return (scores - total).exp() @ v, total


def gradients_of(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, total: Tensor) -> tuple[Tensor, ...]:
    weights = (q @ k.transpose(-1, -2) - total).exp()
    slopes = weights * (grad @ v.transpose(-1, -2) - (grad * out).sum(-1, keepdim=True))
    return slopes @ k, slopes.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ grad


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, total = attend(q, k, v)
        ctx.save_for_backward(q, k, None, v, out, total)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        q, k, _, v, out, total = ctx.saved_tensors
        return gradients_of(grad, q, k, v, out, total)


class Second(Attention):
    """Returns attention's output as the second output."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
        out, total = attend(q, k, v)
        ctx.save_for_backward(q, k, None, v, out, total)
        ctx.mark_non_differentiable(total)
        return total, out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return Attention.backward(ctx, grads[1])


class Another(Attention):
    """Saves a copy of the output."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, total = attend(q, k, v)
        ctx.save_for_backward(q, k, None, v, out.clone(), total)
        return out


@torch.library.custom_op("ckpt_kernels_tests::attention", mutates_args=())
def custom(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return attend(q, k, v)


def _set_up(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, ...]:
    return gradients_of(grad, *ctx.saved_tensors)


custom.register_autograd(_backward, setup_context=_set_up)


def written_to(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention, followed by a write to the output, which the backward pass needs."""
    out = Attention.apply(q, k, v)
    with torch.no_grad():
        out.mul_(2)
    return out


ATTENTIONS = {
    "function": (Attention.apply, 2),
    "second output": (lambda *heads: Second.apply(*heads)[1], 2),
    "custom op": (lambda *heads: custom(*heads)[0], 2),
    "saves another": (Another.apply, 3),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_layer_keeps_input_and_attention_output(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy with heads side by side, which the output product reads, is not kept."""
    attention, most = ATTENTIONS[name]
    monkeypatch.setattr(TF, "scaled_dot_product_attention", lambda q, k, v, **_: attention(q, k, v))
    model, x = made()
    assert_same_bits(gradients(layer(model), model, x), gradients(model, model, x))
    few = 2 * TOKENS * (2 + HEADS) * 4 + 2 * model.cos.nbytes + 4 * 64 * 4
    assert most * x.nbytes <= saved_bytes(layer(model), x) <= most * x.nbytes + few


def test_attention_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass runs as many of attention's products as without a layer."""
    monkeypatch.setattr(TF, "scaled_dot_product_attention", lambda q, k, v, **_: Attention.apply(q, k, v))
    model, x = made()
    assert backward_ops(layer(model), x)["bmm"] == backward_ops(model, x)["bmm"] > 0


def test_a_write_to_the_output_is_the_same_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TF, "scaled_dot_product_attention", lambda q, k, v, **_: written_to(q, k, v))
    model, x = made()
    for call in (model, layer(model)):
        with pytest.raises(RuntimeError, match=r"modified by an in-?place operation"):
            gradients(call, model, x)
    assert x.device.type == DEVICE


def test_a_product_reads_the_written_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of the product's weight is from the values that the product read."""
    monkeypatch.setattr(TF, "scaled_dot_product_attention", lambda q, k, v, **_: written_to(q, k, v))
    model, x = made()
    found, expected = (torch.autograd.grad(call(x).sum(), model.o.weight) for call in (layer(model), model))
    assert_same_bits(list(found), list(expected))


@pytest.mark.parametrize("around", ["attention", "layer"])
def test_users_hooks_unpack_only_in_the_backward_pass(around: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Users' saved-tensor hooks may move tensors to another device, or return them only once."""
    unpacked: list[int] = []

    def hooks() -> Any:
        return torch.autograd.graph.saved_tensors_hooks(lambda t: (t,), lambda held: (unpacked.append(1), *held)[1])

    def attention(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        with hooks() if around == "attention" else contextlib.nullcontext():
            return Attention.apply(q, k, v)

    monkeypatch.setattr(TF, "scaled_dot_product_attention", attention)
    model, x = made()
    with hooks() if around == "layer" else contextlib.nullcontext():
        output = layer(model)(x)
    assert not unpacked
    assert_same_bits(gradients(lambda _: output, model, x), gradients(model, model, x))


def test_attention_whose_graph_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient that the forward takes frees attention's graph within the layer."""

    def attention(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        output = Attention.apply(q, k, v)
        torch.autograd.grad(output.sum(), v)
        return output

    monkeypatch.setattr(TF, "scaled_dot_product_attention", attention)
    model, x = made()
    found, expected = (torch.autograd.grad(call(x).sum(), model.o.weight) for call in (layer(model), model))
    assert_same_bits(list(found), list(expected))


def test_layer_keeps_one_output_of_flex_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch rejects flex attention with gradients on a CPU, but computes them without this check."""
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    monkeypatch.setattr(flex, "_validate_device", lambda *operands: None, raising=False)
    monkeypatch.setattr(TF, "scaled_dot_product_attention", lambda q, k, v, **_: flex.flex_attention(q, k, v))
    model, x = made()
    assert_same_bits(gradients(layer(model), model, x), gradients(model, model, x))
    # A copy of the output would add x.nbytes.
    assert 2 * x.nbytes <= saved_bytes(layer(model), x) < 2.5 * x.nbytes
