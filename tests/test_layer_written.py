"""The level "layer" for linear layers with a forward of their own, and for heads that are indexed by a list."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor, nn

import ckpt_kernels
from ckpt_kernels.memory import saved_bytes

from .conftest import DEVICE
from .test_convert_layers import assert_same_bits, at_levels, step
from .test_layer import backward_ops

WIDTH, TOKENS = 32, 24


class Linear(nn.Linear):
    """A linear layer as in Falcon. `written` says if the product is written to before or after the bias is added."""

    written = ""

    def forward(self, input: Tensor) -> Tensor:
        product = input @ self.weight.T
        if self.written == "before":
            with torch.no_grad():
                product[0].mul_(2)
        output = product + self.bias
        if self.written == "after":
            with torch.no_grad():
                product[0].mul_(2)
        return output


class Matmul(Linear):
    def forward(self, input: Tensor) -> Tensor:
        return torch.matmul(input, self.weight.T) + self.bias


class WrittenBefore(Linear):
    written = "before"


class WrittenAfter(Linear):
    written = "after"


class Layer(nn.Module):
    def __init__(self, linear: type[nn.Linear], act: nn.Module | None = None) -> None:
        super().__init__()
        self.norm, self.act = nn.LayerNorm(WIDTH), act or nn.GELU()
        self.up, self.down = linear(WIDTH, 4 * WIDTH), linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


def rows() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, TOKENS, WIDTH, device=DEVICE)


def kept(model: nn.Module) -> float:
    """The saved bytes, as a multiple of the input's bytes."""
    x = rows().requires_grad_()
    return saved_bytes(model, x, parameters_of=model) / x.nbytes


@pytest.mark.parametrize(("linear", "most"), [(Linear, 1), (Matmul, 1), (WrittenAfter, 1), (WrittenBefore, 5)])
def test_linear_layers_that_add_the_bias_themselves(linear: type[nn.Linear], most: int) -> None:
    """The layer's input is kept; with a write to the product before the sum, the products are kept too."""
    plain, twin = at_levels(lambda: Layer(linear))
    assert_same_bits(step(twin, rows()), step(plain, rows()))
    assert most <= kept(twin) < most + 0.5


def test_the_last_product_runs_once() -> None:
    plain, twin = at_levels(lambda: Layer(Linear))
    before, after = (backward_ops(model, rows().requires_grad_())["mm"] for model in (plain, twin))
    assert after == before + 1


def test_report_names_the_linear_layers() -> None:
    report = ckpt_kernels.convert(nn.ModuleList([Layer(Linear), Layer(nn.Linear)]), recompute="all")
    named = [entry.name for entry in report.replaced if entry.by == "recipes of a linear layer's sum"]
    assert named == ["0.up", "0.down"]


class Grouped(nn.Module):
    """Attention with groups of two queries, a key and a value, as in Falcon."""

    def __init__(self, written: bool = False) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.written = written

    def split(self, both: Tensor) -> list[Tensor]:
        both = both.unflatten(-1, (2, 4, -1))
        query, key, value = both[:, :, :, :-2], both[:, :, :, [-2]], both[:, :, :, [-1]]
        if self.written:
            with torch.no_grad():
                key.mul_(2)
        key, value = torch.broadcast_to(key, query.shape), torch.broadcast_to(value, query.shape)
        return [part.flatten(2, 3) for part in (query, key, value)]

    def forward(self, x: Tensor) -> Tensor:
        both = self.qkv(x)
        q, k, v = (part.transpose(1, 2) for part in self.split(both))
        return self.out(TF.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class Attending(nn.Module):
    def __init__(self, written: bool) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), Grouped(written)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm(x))


@pytest.mark.parametrize(("written", "most"), [(False, 2), (True, 3)])
def test_heads_that_are_picked_by_a_list(written: bool, most: int) -> None:
    """The input and attention's output are kept; with a write to the keys, the keys are kept too."""
    plain, twin = at_levels(lambda: Attending(written))
    assert_same_bits(step(twin, rows()), step(plain, rows()))
    assert most <= kept(twin) < most + 0.5


def decorated(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(forward)
    def call(*args: Any) -> Tensor:
        return forward(*args)

    return call


class Decorated(Linear):
    @decorated
    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T + self.bias


class WithChild(nn.Linear):
    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.last = nn.Identity()

    def forward(self, input: Tensor) -> Tensor:
        return self.last(input @ self.weight.T + self.bias)


class WithGain(nn.Linear):
    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def forward(self, input: Tensor) -> Tensor:
        return (input @ self.weight.T + self.bias) * self.gain


class Multiplied(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return (input @ self.weight.T) * self.bias


class Lazy(nn.LazyLinear):
    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T + self.bias


def without_source() -> nn.Module:
    names: dict[str, Any] = {}
    exec("def forward(self, input):\n    return input @ self.weight.T + self.bias", names)
    return type("WithoutSource", (nn.Linear,), {"forward": names["forward"]})(WIDTH, WIDTH)


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "with a child": WithChild,
    "with another parameter": WithGain,
    "no sum": lambda: Multiplied(WIDTH, WIDTH),
    "no bias": lambda: Linear(WIDTH, WIDTH, bias=False),
    "no shape yet": lambda: Lazy(WIDTH),
    "no source": without_source,
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_forwards_are_not_recognised_as_linear(name: str) -> None:
    report = ckpt_kernels.convert(nn.ModuleList([OTHERS[name](), Decorated(WIDTH, WIDTH)]), recompute="all")
    named = [entry.name for entry in report.replaced if entry.by == "recipes of a linear layer's sum"]
    assert named == ["1"]
