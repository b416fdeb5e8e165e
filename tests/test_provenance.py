"""Discarding the outputs of torch's own ops: kept bytes, bitwise equal gradients, and outputs that are kept."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor

import ckpt_kernels
from ckpt_kernels import functional as F
from ckpt_kernels import recompute

from .conftest import DEVICE
from .discarded_outputs import (
    ROWS,
    STATISTICS,
    UNIT,
    WIDTH,
    Parameters,
    assert_same_bits,
    assert_unchanged,
    kept_bytes,
    maps,  # noqa: F401, the fixture image
    normed,
    rows,  # noqa: F401, the fixture x
    same_bits,
    shows_saved,
)

pytestmark = pytest.mark.skipif(not shows_saved, reason="this torch does not show what nodes hold")


# Cases whose outputs are discarded: a model of x, the tensors of x's size that the model keeps without and with
# discarding, and the bytes of other tensors.


def halves(h: Tensor) -> Tensor:
    gate, value = h.chunk(2, -1)
    return TF.silu(gate) * value


ALIKE = {
    "gelu": TF.gelu,
    "tanh gelu": lambda h: TF.gelu(h, approximate="tanh"),
    "silu": TF.silu,
    "softplus": lambda h: TF.softplus(h, 2.0, 3.0),
    "elu": lambda h: TF.elu(h, 0.5),
    "selu": TF.selu,
    "celu": lambda h: TF.celu(h, 0.7),
    "leaky_relu": lambda h: TF.leaky_relu(h, 0.2),
    "mish": TF.mish,
    "hardswish": TF.hardswish,
    "hardsigmoid": TF.hardsigmoid,
    "relu6": TF.relu6,
    "clamp": lambda h: h.clamp(max=0.3),
    "erf": torch.erf,
    "sin": torch.sin,
    "cos": torch.cos,
    "abs": torch.abs,
    "square": torch.square,
    "cube": lambda h: h**3,
    "prelu": lambda h: TF.prelu(h, torch.full((1,), 0.3, device=DEVICE, requires_grad=True)),
}
# torch's logsigmoid also keeps a buffer of the input's size, on CPUs only.
BUFFER = 0 if DEVICE == "cuda" else 1
MODELS: dict[str, tuple[Callable[[Tensor, Parameters], Tensor], float, float, int]] = {
    "silu(g) * v": (
        lambda x, p: TF.linear(TF.silu(TF.linear(x, p["a"])) * TF.linear(x, p["b"]), p["c"]),
        *(5, 3, 0),
    ),
    "h * sigmoid(h)": (lambda x, p: TF.linear((h := TF.linear(x, p["a"])) * h.sigmoid(), p["c"]), 4, 2, 0),
    "sigmoid(h) * h": (lambda x, p: TF.linear((h := TF.linear(x, p["a"])).sigmoid() * h, p["c"]), 4, 2, 0),
    "relu(h).square()": (lambda x, p: TF.linear(TF.relu(TF.linear(x, p["a"])).square(), p["c"]), 3, 2, 0),
    "relu(h) ** 2": (lambda x, p: TF.linear(TF.relu(TF.linear(x, p["a"])) ** 2, p["c"]), 3, 2, 0),
    "glu": (lambda x, p: TF.linear(TF.glu(TF.linear(x, p["a"])), p["half"]), 2.5, 2, 0),
    "halves of a product": (lambda x, p: TF.linear(halves(TF.linear(x, p["a"])), p["half"]), 3, 2, 0),
    "a view of it": (lambda x, p: TF.linear(TF.gelu(TF.linear(x, p["a"])).view(4, -1, WIDTH), p["c"]), 3, 2, 0),
    "a part of it": (lambda x, p: TF.gelu(TF.linear(x, p["a"]))[2:20].sin(), 3, 2, 0),
    "logsigmoid": (lambda x, p: TF.linear(TF.logsigmoid(TF.linear(x, p["a"])), p["c"]), 3 + BUFFER, 2 + BUFFER, 0),
    "scaled by a number": (lambda x, p: TF.linear(normed(x) * 0.5, p["c"]), 2, 1, STATISTICS),
    "divided by a number": (lambda x, p: TF.linear(normed(x) / 3, p["c"]), 2, 1, STATISTICS),
    "scaled by a tensor": (lambda x, p: TF.linear(normed(x) * x.detach(), p["c"]), 3, 2, STATISTICS),
    "negated": (lambda x, p: TF.linear(-normed(x), p["c"]), 2, 1, STATISTICS),
    "rectified": (lambda x, p: TF.linear(TF.relu(normed(x)), p["c"]), 2, 1, STATISTICS),
    "a difference": (
        lambda x, p: TF.linear(torch.sub(normed(x), normed(x.sin()), alpha=2), p["c"]),
        *(4, 3, 2 * STATISTICS),
    ),
    "one after the other": (
        lambda x, p: TF.linear(torch.cat((normed(x), normed(x.sin()))), p["c"]),
        *(5, 3, 2 * STATISTICS),
    ),
    "cast": (
        lambda x, p: TF.linear(normed(x).to(torch.bfloat16), p["c"].bfloat16()),
        *(1.5, 1, STATISTICS + WIDTH * WIDTH * 2),
    ),
    "transposed and copied": (
        lambda x, p: normed(x).view(4, 16, WIDTH).transpose(1, 2).contiguous() @ p["a"][:16],
        *(2, 1, STATISTICS),
    ),
    "transposed and reshaped": (
        lambda x, p: TF.linear(normed(x).view(4, 16, WIDTH).permute(1, 0, 2).reshape(ROWS, WIDTH), p["a"]),
        *(2, 1, STATISTICS),
    ),
    "a chain": (
        lambda x, p: TF.linear(TF.silu(TF.relu(normed(x)).square()) * TF.relu(normed(x)), p["c"]),
        *(7, 2, 2 * STATISTICS),
    ),
    **{name: (lambda x, p, f=f: TF.linear(f(TF.linear(x, p["a"])), p["c"]), 3, 2, 0) for name, f in ALIKE.items()},
}
MODELS["prelu"] = (*MODELS["prelu"][:3], 4)


@pytest.mark.parametrize("name", MODELS)
def test_recomputable_outputs_are_not_kept(name: str, x: Tensor) -> None:
    model, eager, discarding, other = MODELS[name]
    p = Parameters()
    call = lambda: model(x, p)  # noqa: E731
    assert kept_bytes(call) == eager * UNIT + other
    assert kept_bytes(recompute.discard_outputs()(call)) == discarding * UNIT + other
    assert_unchanged(call, [x, *p.values()])


def test_a_bias_is_copied(x: Tensor) -> None:
    """An optimizer's step before the backward pass is no error in eager torch, so neither here."""
    p = Parameters()

    def gradients(around: contextlib.AbstractContextManager) -> tuple[Tensor, ...]:
        with around:
            y = TF.linear(normed(x) + p["bias"], p["c"])
        with torch.no_grad():
            p["bias"].mul_(2)
        return torch.autograd.grad(y.sum(), [x, p["c"]])

    assert kept_bytes(recompute.discard_outputs()(lambda: TF.linear(normed(x) + p["bias"], p["c"]))) == (
        UNIT + STATISTICS + WIDTH * 4
    )
    state = p["bias"].detach().clone()
    expected = gradients(contextlib.nullcontext())
    p["bias"].data.copy_(state)
    assert_same_bits(gradients(recompute.discard_outputs()), expected)


# Residual networks


def norm2d(t: Tensor) -> Tensor:
    return F.batch_norm(t, None, None, None, None, True)


def bottleneck(t: Tensor, p: Parameters, index: int, kind: str) -> Tensor:
    h = t
    for part in range(3):
        h = norm2d(TF.conv2d(h, p[f"conv{index}{part}"]))
        if part < 2:
            h = TF.relu(h, inplace=kind != "functional")
    if kind == "functional":
        return TF.relu(h + t)
    h += t
    return TF.relu(h, inplace=kind == "in place")


def network(image: Tensor, p: Parameters, kind: str, blocks: int = 5) -> Tensor:
    h = TF.relu(norm2d(TF.conv2d(image, p["conv"])))
    for index in range(blocks):
        h = bottleneck(h, p, index, kind)
    return TF.conv2d(h, p["conv"])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", ["in place", "sum in place", "functional"])
def test_residual_networks_keep_inputs_of_norms(kind: str, layout: torch.memory_format, image: Tensor) -> None:
    p = Parameters()
    x = image.detach().to(memory_format=layout).requires_grad_()
    call = lambda: network(x, p, kind)  # noqa: E731
    # Each norm keeps the input, and two numbers for each of 8 channels.
    norms = 16 * (x.nbytes + 2 * 8 * 4)
    assert kept_bytes(call) == x.nbytes + norms + 16 * x.nbytes
    options = {"temporaries": kind == "functional"}
    assert kept_bytes(recompute.discard_outputs(**options)(call)) == x.nbytes + norms
    assert_unchanged(call, [x, *p.values()], **options)
    # Without `temporaries`, unsaved results, which may have been written to, are not recomputed.
    kept = x.nbytes + norms + (5 * x.nbytes if kind == "functional" else 0)
    assert kept_bytes(recompute.discard_outputs()(call)) == kept
    assert_unchanged(call, [x, *p.values()])


def test_temporaries_are_recomputed_on_request(x: Tensor) -> None:
    p = Parameters()

    def call() -> Tensor:
        h = TF.linear(x, p["a"])
        return TF.linear(h * torch.sigmoid(1.702 * h), p["b"])

    assert kept_bytes(call) == 4 * UNIT
    assert kept_bytes(recompute.discard_outputs()(call)) == 3 * UNIT
    assert kept_bytes(recompute.discard_outputs(temporaries=True)(call)) == 2 * UNIT
    assert_unchanged(call, [x, *p.values()], temporaries=True)


# Products


@pytest.mark.parametrize("bias", [False, True])
def test_products_that_elementwise_blocks_read_are_discarded(bias: bool, x: Tensor) -> None:
    p = Parameters()

    def linear(t: Tensor, name: str) -> Tensor:
        return TF.linear(t, p[name], p["bias" + name] if bias else None)

    def gated(x: Tensor) -> Tensor:
        return TF.linear(F.glu(linear(x, "a"), linear(x, "b")), p["c"])

    def packed(x: Tensor) -> Tensor:
        return TF.linear(F.packed_glu(linear(x, "a")), p["half"])

    def act(x: Tensor) -> Tensor:
        return TF.linear(F.bias_act(linear(x, "a"), activation="gelu"), p["c"])

    for call, eager, copies in ((gated, 4, 2), (packed, 2.5, 1), (act, 3, 1)):
        shaped = lambda call=call: call(x.view(4, -1, WIDTH))  # noqa: E731
        assert kept_bytes(shaped) == eager * UNIT
        # Biases are copied.
        assert kept_bytes(recompute.discard_outputs(products=True)(shaped)) == UNIT + bias * copies * WIDTH * 4
        assert_unchanged(shaped, [x, *p.values()], products=True)
        with recompute.discard_outputs(products=True):
            assert kept_bytes(recompute.discard_outputs()(shaped)) > UNIT + bias * copies * WIDTH * 4


def test_products_that_others_read_are_kept(x: Tensor) -> None:
    p = Parameters()
    call = recompute.discard_outputs(products=True)(lambda: TF.linear(TF.silu(TF.linear(x, p["a"])), p["c"]))
    assert kept_bytes(call) == 2 * UNIT
    normed_product = recompute.discard_outputs(products=True)(lambda: F.layer_norm(TF.linear(x, p["a"]), WIDTH))
    assert kept_bytes(normed_product) == 2 * UNIT + STATISTICS


def test_products_under_autocast(x: Tensor) -> None:
    p = Parameters()

    def call() -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            gate, value = (TF.linear(x, p[name], p["bias" + name]) for name in "ab")
            return TF.linear(F.glu(gate, value), p["c"])

    kept = kept_bytes(recompute.discard_outputs(products=True)(call))
    assert kept == UNIT // 2 + 3 * WIDTH * WIDTH * 2 + 2 * WIDTH * 2
    assert_unchanged(call, [x, *p.values()], products=True)


class Labelled(torch.autograd.Function):
    """Twice the input. The node has attributes of its own, named like methods of nodes."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        ctx.name = ctx._sequence_nr = "doubled"
        return input * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        assert ctx.name == "doubled"
        return grad * 2


@pytest.mark.parametrize("products", [False, True])
def test_attributes_that_a_model_gives_its_nodes(products: bool) -> None:
    x, weight = torch.randn(4, 6, requires_grad=True), torch.randn(6, 6, requires_grad=True)

    def output() -> Tensor:
        doubled = Labelled.apply(x.sin())
        return (torch.sigmoid(Labelled.apply(doubled + x)) * doubled) @ weight

    expected = torch.autograd.grad(output().sum(), (x, weight))
    with recompute.discard_outputs(products=products):
        found = output()
    for mine, theirs in zip(torch.autograd.grad(found.sum(), (x, weight)), expected, strict=True):
        assert same_bits(mine, theirs)


class Shifted(torch.nn.Module):
    """Three shifts, and the activations of the result and of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (torch.nn.Parameter(torch.rand(64)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(x)
        return TF.gelu(x + self.first + self.second + self.third) + TF.gelu(x)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_copies_of_biases_are_smaller_than_what_they_save(count: int) -> None:
    model, x = Shifted().to(DEVICE), torch.randn(count, 64, device=DEVICE, requires_grad=True)
    plain = kept_bytes(lambda: model(x))
    ckpt_kernels.convert(model)
    kept = kept_bytes(lambda: model(x))
    assert kept <= plain
    # With enough rows, the copies take the place of the shifted tensor.
    assert (kept < plain) == (count == 8)
