"""Models that are converted at the level "layer": kept tensors, and tensors at the boundaries of layers."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ckpt_kernels
from ckpt_kernels.memory import saved_bytes
from ckpt_kernels.recompute import layer

from .conftest import DEVICE
from .conversion import RMSNormInFloat32
from .test_layer import HEADS, TOKENS, WIDTH, assert_same_bits, gradients


class PreNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.first, self.second = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        attended = TF.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        x = x + self.out(attended)
        return x + self.second(TF.gelu(self.first(self.norm2(x))))


class PostNorms(PreNorms):
    """The norms read sums."""

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(TF.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))

    def mlp(self, x: Tensor) -> Tensor:
        return self.second(TF.gelu(self.first(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.mlp(x))


class Sandwich(PostNorms):
    """Norms before and after attention and MLP, and a branch that is multiplied by a number."""

    def __init__(self) -> None:
        super().__init__()
        self.norm3, self.norm4 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.scale = 0.5

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        x = self.norm2(self.attention(self.norm1(x)))
        x = residual + x * self.scale
        residual = x
        x = self.norm3(x)
        return residual + self.norm4(self.mlp(x))


def applied(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return function(x)


class Chunked(PostNorms):
    """Names itself in an error, and passes a method of its own to a function, as transformers' BERT does."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 3:
            raise ValueError(f"{self} received {tuple(x.shape)}")
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + applied(self.mlp, x))


class Stack(nn.Module):
    def __init__(self, kind: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([kind() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for module in self.layers:
            x = module(x)
        return x


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, 0.0, batch_first=True, norm_first=True)


class InFloat32(PreNorms):
    """Norms that compute in float32. In 16 bits they save a copy of their input, because eager torch, which saves a
    float32 copy, allows a write to it. Recipes read these copies."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = RMSNormInFloat32(WIDTH), RMSNormInFloat32(WIDTH)


@pytest.mark.parametrize(
    ("kind", "dtype", "kept"),
    [
        (PreNorms, torch.float32, 2.0),
        (PostNorms, torch.float32, 2.0),
        (Sandwich, torch.float32, 2.0),
        (Chunked, torch.float32, 2.0),
        (encoder_layer, torch.float32, 7.0),
        (InFloat32, torch.bfloat16, 2.0),
    ],
)
def test_converted_layers_keep_input_and_attention_output(
    kind: Callable[[], nn.Module], dtype: torch.dtype, kept: float
) -> None:
    """Every module of a list that norms its input is a layer. torch's own encoder layer keeps more: its attention
    copies queries, keys and values, and nothing keeps the operands of its sums."""
    torch.manual_seed(0)
    model = Stack(kind).to(DEVICE, dtype)
    x = torch.randn(2, TOKENS, WIDTH, device=DEVICE, dtype=dtype).requires_grad_()
    found = {}
    for level in ("all", "layer"):
        ckpt_kernels.convert(model, recompute=level)
        found[level] = gradients(model, model, x)
    assert_same_bits(found["layer"], found["all"])
    small_tensors = 2 * TOKENS * 4 * (8 + HEADS) + 10 * WIDTH * 4
    assert saved_bytes(model, x) <= 3 * (kept * x.nbytes + small_tensors)


class Bottleneck(PreNorms):
    """An activation of a sum, whose recipe reads the layer's input."""

    def forward(self, x: Tensor) -> Tensor:
        return TF.relu(self.norm2(self.second(TF.relu(self.first(self.norm1(x))))) + x)


def test_in_nested_checkpoints() -> None:
    """The first layer reads a leaf, which the outer checkpoint passes to the inner checkpoint as another tensor."""
    torch.manual_seed(0)
    model = Stack(Bottleneck).to(DEVICE)
    x = torch.randn(2, TOKENS, WIDTH, device=DEVICE).requires_grad_()

    def nested(x: Tensor) -> Tensor:
        return checkpoint(lambda y: checkpoint(model, y, use_reentrant=False), x, use_reentrant=False)

    ckpt_kernels.convert(model, recompute="layer")
    assert_same_bits(gradients(nested, model, x), gradients(model, model, x))


def test_allow_mutation_on_saved_tensors() -> None:
    """Within torch's context, gradients are of the saved values, whatever is written later."""
    torch.manual_seed(0)
    model = Stack(PreNorms).to(DEVICE)
    x = torch.randn(2, TOKENS, WIDTH, device=DEVICE).requires_grad_()

    def gradients_of(model: nn.Module) -> list[Tensor]:
        with torch.autograd.graph.allow_mutation_on_saved_tensors():
            loss = model(x).square().mean()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(2)
            return list(torch.autograd.grad(loss, [x, *model.parameters()]))

    converted = copy.deepcopy(model)
    ckpt_kernels.convert(converted, recompute="layer")
    for found, expected in zip(gradients_of(converted), gradients_of(model), strict=True):
        torch.testing.assert_close(found, expected)


class OfSums(nn.Module):
    """An activation of a sum with the layer's input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(TF.silu(self.norm2(self.first(self.norm1(x))) + x))


class Unsaved(OfSums):
    """No autograd node saves the layer's input."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(TF.silu(self.first(TF.silu(x + 1))))


class Forgetful(Stack):
    """The first layer's input requires no gradient any more when the second layer runs."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers[0](x)
        x.requires_grad_(False)
        return self.layers[2](self.layers[1](y))


@pytest.mark.parametrize("is_leaf", [True, False])
def test_recipes_read_the_input_of_a_layer(is_leaf: bool) -> None:
    x = torch.randn(2, TOKENS, WIDTH, device=DEVICE).requires_grad_()
    kept = {}
    for kind in (OfSums, Unsaved):
        model = Stack(kind).to(DEVICE)
        ckpt_kernels.convert(model, recompute="layer")
        kept[kind] = saved_bytes(model if is_leaf else lambda x, model=model: model(x * 1), x)
    # Three inputs, the statistics of six norms, and copies of three biases.
    assert kept[OfSums] == 3 * (x.nbytes + 4 * 2 * TOKENS * 4 + 4 * WIDTH)
    assert kept[Unsaved] == x.nbytes


def test_a_layer_input_that_stops_requiring_a_gradient() -> None:
    torch.manual_seed(0)
    model = Forgetful(OfSums).to(DEVICE)
    x = torch.randn(2, TOKENS, WIDTH, device=DEVICE)

    def weights() -> list[Tensor]:
        return list(torch.autograd.grad(model(x.clone().requires_grad_()).square().mean(), list(model.parameters())))

    expected = weights()
    ckpt_kernels.convert(model, recompute="layer")
    for found, gradient in zip(weights(), expected, strict=True):
        torch.testing.assert_close(found, gradient)


class Both(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, x * 3

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 2 + grads[1] * 3


@pytest.mark.parametrize("is_written", [False, True])
def test_two_inputs_of_one_node(is_written: bool) -> None:
    """A write after the sum, which autograd does not see, does not change the gradient of the last weight."""
    torch.manual_seed(0)
    module = OfSums().to(DEVICE)
    ckpt_kernels.convert(module, recompute="block")
    x = torch.randn(2, TOKENS, WIDTH, device=DEVICE).requires_grad_()

    def forward(a: Tensor, b: Tensor) -> Tensor:
        total = module.norm2(module.first(module.norm1(a) + module.norm1(b))) + b
        if is_written:
            b.detach().mul_(2)
        return module.second(TF.silu(total))

    def weight(forward: Callable[..., Tensor]) -> Tensor:
        return torch.autograd.grad(forward(*Both.apply(x)).square().mean(), module.second.weight)[0]

    torch.testing.assert_close(weight(layer(forward)), weight(forward))


class WithTail(nn.Module):
    """A layer, and two products with ops of torch between."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layers, self.between = nn.ModuleList([PreNorms()]), between
        self.up, self.down = nn.Linear(WIDTH, 8 * WIDTH), nn.Linear(8 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for each in self.layers:
            x = each(x)
        return self.down(self.between(self.up(x)))


def test_products_outside_of_layers_run_again() -> None:
    """At "layer" as at "all": of the products, only those that nothing after can recompute are kept."""

    kept = {}
    for level in ("output", "all", "layer"):
        torch.manual_seed(0)
        model = WithTail(lambda h: h * h.sigmoid() * h.tanh()).to(DEVICE)
        ckpt_kernels.convert(model, recompute=level)
        kept[level] = saved_bytes(model, torch.randn(2, 8, WIDTH, device=DEVICE).requires_grad_())
    assert kept["layer"] <= kept["all"] < kept["output"]


def test_other_products_outside_of_layers_are_kept() -> None:
    """A product that no block reads runs again in layers alone."""

    model, x = WithTail(torch.sin).to(DEVICE), torch.randn(2, 8, WIDTH, device=DEVICE).requires_grad_()
    ckpt_kernels.convert(model, recompute="layer")
    assert saved_bytes(model, x) > 8 * x.nbytes
