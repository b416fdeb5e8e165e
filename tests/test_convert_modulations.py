"""Modulations, `norm(x) * (1 + scale) + shift`, that match no pattern. The addition saves neither operand, so the
recipe of the result keeps a copy of the small shift."""

import weakref

import pytest
import torch
from torch import Tensor, nn

import ckpt_kernels
from ckpt_kernels.memory import saved_bytes
from ckpt_kernels.recompute import discard_outputs
from ckpt_kernels.recompute.small_operands import SmallOperand

from .conftest import DEVICE
from .conversion import twins

WIDTH, TOKENS = 16, 24


class Modulated(nn.Module):
    """A norm and a modulation in separate statements, as in diffusion transformers. `written` says when the shift is
    written to."""

    def __init__(self, written: str = "", parts: int = 2) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.table = nn.Parameter(torch.randn(parts, WIDTH) / 4)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.written = written

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        values = self.table[None] + x.mean((0, 1))
        shift, scale = values.unbind(1)[:2]
        if self.written:
            shift = shift.neg()
        normed = normed * (1 + scale) + shift
        if self.written == "before":
            with torch.no_grad():
                shift.mul_(3)
        output = self.linear(normed)
        if self.written == "after":
            with torch.no_grad():
                shift.mul_(3)
        return output


class Transposed(nn.Module):
    """A modulation that matches a pattern, of rows with strides that the kernel does not support."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.table = nn.Linear(WIDTH, 2 * WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.table(x.mean(1)).chunk(2, -1)
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
        return self.linear(self.norm(x) * (1 + scale[:, None]) + shift[:, None])


class LargeOperand(nn.Module):
    """A sum whose second operand is as large as the first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.last = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        return self.last(normed * 2 + self.linear(x))


class Positioned(nn.Module):
    """A sum of a scaled norm and a parameter of the size of one sequence, read through a number of `views`."""

    def __init__(self, views: int = 0) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.table = nn.Parameter(torch.randn(1, TOKENS, WIDTH))
        self.views = views

    def forward(self, x: Tensor) -> Tensor:
        table = self.table
        for _ in range(self.views):
            table = table.transpose(0, 1)
        return self.linear(table + self.norm(x) * 2)


class Normed(nn.Module):
    """The norm of a sum, which matches a pattern, with operands that the kernel does not support."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.table = nn.Parameter(torch.randn(1, TOKENS, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.relu(x) + self.table)


def rows(sequences: int = 2) -> Tensor:
    return torch.randn(sequences, TOKENS, WIDTH, device=DEVICE)


def kept(model: nn.Module, sequences: int = 2) -> float:
    x = rows(sequences).requires_grad_()
    return saved_bytes(model, x, parameters_of=model) / x.nbytes


@pytest.mark.parametrize("written", ["", "before", "after"])
def test_a_written_shift_gives_the_same_gradients(written: str) -> None:
    model, twin = twins(lambda: nn.ModuleList([Modulated(written)]))
    ckpt_kernels.convert(model, recompute="block")
    ckpt_kernels.convert(twin, recompute="output")
    x = rows()
    for layers in (model, twin):
        layers[0](x).square().sum().backward()
    for found, expected in zip(twin.parameters(), model.parameters(), strict=True):
        assert found.grad is not None and expected.grad is not None
        assert torch.equal(found.grad, expected.grad)


@pytest.mark.parametrize("kind", [Modulated, Transposed])
def test_a_modulation_is_not_kept(kind: type[nn.Module]) -> None:
    model, twin = twins(kind)
    ckpt_kernels.convert(twin, recompute="output")
    # Neither the norm's output nor the modulated output, which the product reads, is kept.
    assert kept(model) - kept(twin) > 1.8


class ByOperator(nn.Module):
    """A scaled and shifted norm, which a product reads. The scale and the shift are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.table = nn.Parameter(torch.randn(2, WIDTH))

    def scaled(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return self.norm(x) * scale + shift

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.scaled(x, *self.table.exp()))


class ByFunctions(ByOperator):
    def scaled(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return torch.add(torch.mul(self.norm(x), scale), shift)


class ByMethods(ByOperator):
    def scaled(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return self.norm(x).mul(scale).add(shift)


@pytest.mark.parametrize("kind", [ByOperator, ByFunctions, ByMethods])
def test_a_scaled_norm_is_not_kept(kind: type[nn.Module]) -> None:
    model, twin = twins(kind)
    ckpt_kernels.convert(twin, recompute="output")
    assert kept(model) - kept(twin) > 1.8


def test_an_operand_that_was_written_to_is_not_copied() -> None:
    written, other = Modulated("before").to(DEVICE), Modulated("after").to(DEVICE)
    for model in (written, other):
        ckpt_kernels.convert(model, recompute="output")
    assert kept(written) - kept(other) > 0.9


def test_a_shift_does_not_keep_its_whole_storage() -> None:
    model, twin = twins(lambda: Modulated(parts=40 * TOKENS))
    ckpt_kernels.convert(twin, recompute="output")
    assert kept(twin) < kept(model)


def test_a_large_operand_is_not_copied() -> None:
    model, twin = twins(LargeOperand)
    ckpt_kernels.convert(twin, recompute="output")
    assert kept(twin) <= kept(model)


class Unread(nn.Module):
    """A modulation whose result no op saves."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.table = nn.LayerNorm(WIDTH, elementwise_affine=False), nn.Parameter(torch.randn(2, WIDTH))
        self.seen: list[weakref.ref] = []

    def forward(self, x: Tensor) -> Tensor:
        shift = self.table[:1] * 2
        self.seen.append(weakref.ref(shift.untyped_storage()))
        return self.norm(x) * self.table[1:] + shift


class Sums(nn.Module):
    """A chain of sums, each with one small operand."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH, elementwise_affine=False), nn.Linear(WIDTH, WIDTH)
        self.many = nn.Parameter(torch.randn(9, 1, TOKENS // 2, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x) * 2
        for table in self.many:
            h = h + table.neg().repeat(1, 2, 1)
        return self.linear(h)


def test_copies_of_operands_are_no_larger_than_the_gain() -> None:
    model, twin = twins(Sums)
    ckpt_kernels.convert(twin, recompute="output")
    x = torch.randn(4, TOKENS, WIDTH, device=DEVICE).requires_grad_()
    found, eager = (saved_bytes(module, x, parameters_of=module) for module in (twin, model))
    assert found <= eager


def test_small_operands_are_freed_after_the_forward() -> None:
    model = Unread().to(DEVICE)
    ckpt_kernels.convert(model, recompute="output")
    output = model(rows().requires_grad_())
    assert output.grad_fn is not None
    assert model.seen[0]() is None


def test_small_operands_are_freed_with_the_graph() -> None:
    """In a context that stays open, such as one around a whole training."""
    model = Unread().to(DEVICE)
    ckpt_kernels.convert(model, recompute="output")
    with discard_outputs():
        output = model(rows().requires_grad_())
        assert model.seen[0]() is not None
        del output
        assert model.seen[0]() is None


@pytest.mark.parametrize(("sequences", "gain"), [(3, 0), (4, 3 / 4)])
def test_at_most_a_quarter_is_copied(sequences: int, gain: float) -> None:
    model, twin = twins(Positioned)
    ckpt_kernels.convert(twin, recompute="output")
    assert kept(model, sequences) - kept(twin, sequences) == pytest.approx(gain, abs=0.05)


def test_a_sum_within_a_call_is_not_kept() -> None:
    model, twin = twins(Normed)
    ckpt_kernels.convert(twin, recompute="output")
    assert kept(model, 8) - kept(twin, 8) > 0.8


def test_a_parameter_after_an_optimizer_step_is_copied() -> None:
    model = Positioned().to(DEVICE)
    ckpt_kernels.convert(model, recompute="output")
    before = kept(model, 8)
    with torch.no_grad():
        model.table.mul_(2)
    assert kept(model, 8) == before


def test_a_long_history_of_a_small_operand_does_not_count() -> None:
    """The search of the other operand's autograd graph still has the same number of steps."""
    few, many = Positioned(views=2).to(DEVICE), Positioned(views=12).to(DEVICE)
    for model in (few, many):
        ckpt_kernels.convert(model, recompute="output")
    assert kept(many, 8) == kept(few, 8)


def test_freed_memory_is_not_copied() -> None:
    """FSDP frees the memory of weights when it shards them again."""
    operand = torch.ones(4, device=DEVICE)
    small = SmallOperand(operand, None)
    copy = small.copied()
    assert copy is not None and torch.equal(copy, operand)
    # Half of the memory stays, so that a read would not crash.
    operand.untyped_storage().resize_(operand.nbytes // 2)
    assert small.copied() is None
