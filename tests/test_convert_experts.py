"""Experts in a loop, as in transformers: kept rows by level, and gradients with the same bits."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ckpt_kernels
from ckpt_kernels.memory.saved import saved_tensors

from .conftest import DEVICE
from .conversion import close, equal, random_tensor, replacement_of, results_of, twins

EXPERTS, WIDTH, INNER, TOKENS = 3, 8, 16, 24


class Experts(nn.Module):
    """The weights of the router stay in float32, so the weighted rows are cast before they are added."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, WIDTH))
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER))
        self.act = nn.SiLU()
        self.register_buffer("ids", torch.arange(TOKENS) % EXPERTS)

    def gate(self, packed: Tensor) -> Tensor:
        gate, value = packed.chunk(2, dim=-1)
        return self.act(gate) * value

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for expert in range(EXPERTS):
            chosen = torch.where(self.ids == expert)[0]
            rows = F.linear(self.gate(F.linear(x[chosen], self.up[expert])), self.down[expert])
            rows = rows * weights[chosen, None]
            total.index_add_(0, chosen, rows.to(total.dtype))
        return total


class Written(Experts):
    """The weighted rows are written to before the cast."""

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for expert in range(EXPERTS):
            chosen = torch.where(self.ids == expert)[0]
            rows = F.linear(self.gate(F.linear(x[chosen], self.up[expert])), self.down[expert])
            rows = rows * weights[chosen, None]
            with torch.no_grad():
                rows.mul_(2)
            rows = rows.to(total.dtype)
            total = total.index_add(0, chosen, rows.square())
        return total


class Before(Experts):
    """The weighted rows are written to, and a cast to their own dtype returns the sum that was made of them."""

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for expert in range(EXPERTS):
            chosen = torch.where(self.ids == expert)[0]
            rows = F.linear(self.gate(F.linear(x[chosen], self.up[expert])), self.down[expert])
            doubled = rows * 2.0
            with torch.no_grad():
                doubled.mul_(2)
            rows = torch.add(doubled, rows)
            rows = rows.to(rows.dtype)
            total = total.index_add(0, chosen, (rows.square() * weights[chosen, None]).to(dtype=total.dtype))
        return total


class Other(Experts):
    """The second weight is no part of a stack, and a product may have any reader."""

    def __init__(self) -> None:
        super().__init__()
        del self.down
        self.down = nn.ParameterList([nn.Parameter(torch.randn(WIDTH, INNER)) for _ in range(EXPERTS)])


class Biased(Experts):
    """Experts as GPT-OSS has them. An optimizer, or the initialization, has written to the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, 2 * INNER))
        self.down = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH))
        self.up_bias, self.down_bias = (nn.Parameter(torch.randn(EXPERTS, n)) for n in (2 * INNER, WIDTH))

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        with torch.no_grad():
            experts = torch.arange(EXPERTS, device=x.device).unsqueeze(1)
        for expert in experts:
            expert = expert[0]
            chosen = torch.where(self.ids == expert)[0]
            rows = self.gate(x[chosen] @ self.up[expert] + self.up_bias[expert])
            rows = rows @ self.down[expert] + self.down_bias[expert]
            rows = rows * weights[chosen, None]
            total.index_add_(0, chosen, rows.to(total.dtype))
        return total


class Changing(Biased):
    """The parameters change between the reads of two experts."""

    def gate(self, packed: Tensor) -> Tensor:
        with torch.no_grad():
            self.up_bias.mul_(1.5)
        gate, value = packed.chunk(2, dim=-1)
        return self.act(gate) * value


KINDS = (Experts, Written, Before, Other, Biased)


def made(kind: type[nn.Module], dtype: torch.dtype) -> tuple[nn.Module, nn.Module, tuple[Tensor, Tensor]]:
    model, twin = (model.to(dtype) for model in twins(kind))
    for parameter in (*model.parameters(), *twin.parameters()):
        with torch.no_grad():
            parameter.mul_(0.5)
    given = random_tensor(TOKENS, WIDTH, dtype=dtype), random_tensor(TOKENS)
    return model, twin, given


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_levels_have_the_same_bits(kind: type[nn.Module], dtype: torch.dtype) -> None:
    model, _, given = made(kind, dtype)
    ckpt_kernels.convert(model, recompute="block")
    expected = results_of(model, *given)
    for level in ("output", "all", "layer"):
        ckpt_kernels.convert(model, recompute=level)
        assert equal(results_of(model, *given), expected)


def kept_rows(model: nn.Module, given: tuple[Tensor, Tensor]) -> dict[int, int]:
    """The kept rows of floating-point numbers for each token, by the number of columns."""
    x, weights = (tensor.detach().clone().requires_grad_() for tensor in given)
    rows: dict[int, int] = {}
    for tensor in saved_tensors(model, x, weights):
        if tensor.counted and "float" in tensor.dtype and len(tensor.shape) == 2 and tensor.shape[1] > 1:
            rows[tensor.shape[-1]] = rows.get(tensor.shape[-1], 0) + tensor.shape[0]
    return {columns: count // TOKENS for columns, count in rows.items()}


def test_a_bias_that_changes_in_the_forward() -> None:
    model, twin, given = made(Changing, torch.float32)
    found = []
    start = model.up_bias.detach().clone()
    for level in ("block", "output", "all", "layer"):
        ckpt_kernels.convert(model, recompute=level)
        with torch.no_grad():
            model.up_bias.copy_(start)
        found.append(results_of(model, *given))
    assert all(equal(results, found[0]) for results in found)
    assert close(found[0], results_of(twin, *given), 1e-5)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("kind", (Experts, Biased), ids=lambda kind: kind.__name__)
def test_kept_rows(kind: type[nn.Module], dtype: torch.dtype) -> None:
    model, twin, given = made(kind, dtype)
    eager = kept_rows(twin, given)
    assert eager[WIDTH] == 3
    kept = {}
    for level in ("output", "all"):
        ckpt_kernels.convert(model, recompute=level)
        kept[level] = kept_rows(model, given)
    # The input, the packed products, and the last products, which the gradient of the router's weights reads.
    assert kept == {"output": {WIDTH: 2, 2 * INNER: 1}, "all": {WIDTH: 1}}


def test_other_products_are_kept() -> None:
    model, _, given = made(Other, torch.float32)
    ckpt_kernels.convert(model, recompute="all")
    assert kept_rows(model, given) == {WIDTH: 2}


def test_the_report_names_the_rows() -> None:
    model, _, _ = made(Experts, torch.float32)
    assert replacement_of(ckpt_kernels.convert(model), "") == "packed gate; recipes of rows that are added by index"
    assert replacement_of(ckpt_kernels.convert(model, recompute="block"), "") == "packed gate"


def test_a_write_to_an_experts_weight_after_the_forward_is_an_error() -> None:
    model, _, given = made(Experts, torch.float32)
    ckpt_kernels.convert(model, recompute="all")
    loss = model(*(tensor.requires_grad_() for tensor in given)).square().sum()
    with torch.no_grad():
        model.down.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an in-place operation"):
        loss.backward()


def test_autocast_keeps_casts_of_weights_only() -> None:
    model, _, given = made(Experts, torch.float32)
    found = []
    for level in ("block", "all"):
        ckpt_kernels.convert(model, recompute=level)
        with torch.autocast(DEVICE, torch.bfloat16):
            found.append(results_of(model, *given))
            kept = kept_rows(model, given)
    assert equal(*found)
    # The input's cast, and casts of both weights, transposed.
    assert kept == {2 * INNER: EXPERTS * WIDTH // TOKENS, WIDTH: 1 + EXPERTS * INNER // TOKENS}
