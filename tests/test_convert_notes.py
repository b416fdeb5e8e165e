"""Sums and products in converted methods: their results are recomputed if no operand was written to."""

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor, nn

import ckpt_kernels
from ckpt_kernels.memory import saved_bytes
from ckpt_kernels.recompute import discard_outputs, note

from .conftest import DEVICE
from .conversion import twins

WIDTH, ROWS = 64, 96


class Clamped(nn.Module):
    """A gate with clamped halves, as in GPT-OSS, and an activation that no fused function has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.limit, self.alpha = 1.0, 1.5

    def gated(self, both: Tensor) -> Tensor:
        gate, up = both[..., ::2], both[..., 1::2]
        gate = gate.clamp(min=None, max=self.limit)
        up = up.clamp(min=-self.limit, max=self.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.gated(self.first(x)))


class Written(Clamped):
    """Operands are written to under no_grad before they are read."""

    def gated(self, both: Tensor) -> Tensor:
        gate, up = both[..., ::2], both[..., 1::2]
        gate = gate.clamp(min=None, max=self.limit)
        up = up.clamp(min=-self.limit, max=self.limit)
        with torch.no_grad():
            up.mul_(2)
        scaled = gate * self.alpha
        with torch.no_grad():
            scaled.mul_(3)
        return (up + 1) * (gate * torch.sigmoid(scaled))


class WrittenLater(Clamped):
    """Operands are written to after they are read."""

    def gated(self, both: Tensor) -> Tensor:
        gate, up = both[..., ::2], both[..., 1::2]
        gate = gate.clamp(min=None, max=self.limit)
        up = up.clamp(min=-self.limit, max=self.limit)
        scaled = gate * self.alpha
        result = (up + 1) * (gate * torch.sigmoid(scaled))
        with torch.no_grad():
            up.mul_(2)
            scaled.mul_(3)
        return result


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    output = model(x)
    return [output, *torch.autograd.grad(output.square().mean(), [x, *model.parameters()])]


def rows(dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(ROWS, WIDTH, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("level", ["block", "output", "all", "layer"])
@pytest.mark.parametrize("kind", [Clamped, Written, WrittenLater])
def test_gradients_equal_eager(kind: type, level: str) -> None:
    model, twin = twins(kind)
    ckpt_kernels.convert(twin, recompute=level)
    for found, expected in zip(step(twin, rows()), step(model, rows()), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_input_and_product_are_kept(dtype: torch.dtype) -> None:
    """Results of operands that were written to before the read are kept too."""
    x = rows(dtype).requires_grad_()
    kept = {}
    for kind in (Clamped, WrittenLater, Written):
        model, twin = twins(lambda kind=kind: kind().to(dtype))
        ckpt_kernels.convert(twin)
        kept[kind] = saved_bytes(twin, x, parameters_of=twin) / x.nbytes
        eager = saved_bytes(model, x, parameters_of=model) / x.nbytes
        assert eager == 8
    assert kept == {Clamped: 3, WrittenLater: 3, Written: 5}


def test_report_names_the_recipes() -> None:
    report = ckpt_kernels.convert(nn.Sequential(Clamped()))
    assert ["recipes of clamped tensors"] == [entry.by for entry in report.replaced if entry.kind == "Clamped"]


class Sum(nn.Module):
    """A method without products of a norm's output, and with nothing to recompute at levels below "layer"."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        return x + self.last(normed)


@pytest.mark.parametrize(("kind", "level"), [(Clamped, "block"), (Sum, "output"), (Sum, "all")])
def test_methods_are_not_rewritten_without_a_gain(kind: type[nn.Module], level: str) -> None:
    report = ckpt_kernels.convert(nn.Sequential(kind()), recompute=level)
    assert not [entry.by for entry in report.replaced if entry.kind == kind.__name__]


def kept_of(first: Tensor, second: Tensor, noted: bool) -> int:
    weight = torch.randn(WIDTH, WIDTH, requires_grad=True, device=DEVICE)

    def run() -> Tensor:
        with discard_outputs():
            made = TF.silu(first), TF.silu(second)
            total = made[0] + made[1]
            if noted:
                note(total, *made)
            return total @ weight

    return saved_bytes(run, parameters_of=nn.ParameterList([weight]))


def test_a_noted_sum_of_recomputable_operands_is_discarded() -> None:
    first, second = rows().requires_grad_(), rows().requires_grad_()
    assert kept_of(first, second, False) == 3 * first.nbytes
    assert kept_of(first, second, True) == 2 * first.nbytes


def test_notes_of_other_results_are_ignored() -> None:
    x = rows().requires_grad_()
    with discard_outputs():
        y = x * 2
        with torch.no_grad():
            y.add_(1)
        total = y + y
        note(total, y, y)
        assert "ckpt_kernels" not in total.grad_fn.metadata
        for operands in ((x, True), (x, None), (x, "1")):
            made = x + 1
            note(made, *operands)
            assert "ckpt_kernels" not in made.grad_fn.metadata
        note(3, x)
        note(x.detach(), x)
    made = x + 1
    note(made, x, 1)
    assert "ckpt_kernels" not in made.grad_fn.metadata


class Layer(nn.Module):
    """A sum with a scaled product, read by a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.inner, self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale = 0.5

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        x = self.inner(torch.tanh(x))
        x = residual + x * self.scale
        residual = x
        x = self.norm(x)
        return residual + self.last(TF.gelu(self.first(x))) * self.scale


def test_sums_with_scaled_products_are_not_kept_in_layers() -> None:
    model, twin = twins(lambda: nn.Sequential(nn.ModuleList([Layer()])[0]))
    layers = nn.ModuleList(model)
    ckpt_kernels.convert(layers, recompute="layer")
    x = rows().requires_grad_()
    for found, expected in zip(step(model, rows()), step(twin, rows()), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert saved_bytes(model, x, parameters_of=model) <= 2.2 * x.nbytes


class Attending(nn.Module):
    """A layer that concatenates the queries from parts, and whose sum a norm reads. `written` names the tensor that is
    written to."""

    def __init__(self, written: str = "") -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.wide, self.narrow = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.act = nn.GELU()
        self.written = written

    def forward(self, x: Tensor) -> Tensor:
        normed = self.first(x)
        q, k, v = (linear(normed).view(1, ROWS, 4, -1).transpose(1, 2) for linear in (self.q, self.k, self.v))
        k = k * 0.5
        rotated, passed = q[..., :4], q[..., 4:]
        if self.written == "a part before":
            with torch.no_grad():
                rotated.mul_(2)
        q = torch.cat((rotated, passed), dim=-1)
        if self.written == "a part after":
            with torch.no_grad():
                rotated.mul_(2)
        attended = TF.scaled_dot_product_attention(q, k, v, is_causal=True)
        attended = self.o(attended.transpose(1, 2).flatten(-2)[0])
        if self.written == "a view before":
            with torch.no_grad():
                attended.view(-1)[:5].mul_(4)
        total = x + attended
        if self.written == "the sum":
            with torch.no_grad():
                total.mul_(2)
        if self.written == "what is added":
            with torch.no_grad():
                attended.mul_(2)
        normed = self.second(total)
        return total + self.narrow(self.act(self.wide(normed)))


class FunctionNorm(nn.Module):
    """A norm that stores the weight minus 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(WIDTH)), nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return TF.layer_norm(x, (WIDTH,), self.weight + 1, self.bias)


def with_function_norms() -> Attending:
    made = Attending()
    made.first, made.second = FunctionNorm(), FunctionNorm()
    return made


WRITTEN = ["", "a part before", "a part after", "a view before", "the sum", "what is added"]


@pytest.mark.parametrize("written", WRITTEN)
def test_a_layer_gives_the_same_gradients(written: str) -> None:
    model, twin = twins(lambda: nn.ModuleList([Attending(written)]))
    ckpt_kernels.convert(model, recompute="block")
    ckpt_kernels.convert(twin, recompute="layer")
    for found, expected in zip(step(twin[0], rows()), step(model[0], rows()), strict=True):
        assert torch.equal(found, expected)


def test_layer_keeps_input_and_attention_output() -> None:
    """Neither the queries and keys nor the sum that a norm reads are kept, but a few numbers a row."""
    x = rows().requires_grad_()
    kept = {}
    for name, kind in (("own", Attending), ("written", lambda: Attending("a part before")), ("f", with_function_norms)):
        model = nn.ModuleList([kind().to(DEVICE)])
        ckpt_kernels.convert(model, recompute="layer")
        kept[name] = saved_bytes(model[0], x, parameters_of=model) / x.nbytes
    assert kept["own"] < 2.3
    assert round(kept["f"] - kept["own"], 1) == 0
    # The concatenated queries.
    assert round(kept["written"] - kept["own"], 1) == 1


class Unit:
    """An object that is no tensor, with a method named like a cast."""

    def to(self, value: Tensor) -> Tensor:
        return value * 2


class WithUnit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.act, self.unit = nn.Linear(8, 16), nn.Linear(16, 8), nn.GELU(), Unit()

    def forward(self, x: Tensor) -> Tensor:
        return self.unit.to(value=x) + self.second(self.act(self.first(x)))


def test_arguments_of_methods_that_are_no_casts_have_any_name() -> None:
    model, x = WithUnit().to(DEVICE), torch.randn(4, 8, device=DEVICE)
    expected = model(x)
    ckpt_kernels.convert(model, recompute="all")
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("level", ["output", "all"])
def test_a_last_bias_may_be_written_after_its_use(level: str) -> None:
    model, x = WithUnit().to(DEVICE), torch.randn(4, 8, device=DEVICE)
    ckpt_kernels.convert(model, recompute=level)
    output = model(x)
    with torch.no_grad():
        model.second.bias.mul_(0.5)
    output.sum().backward()
    torch.testing.assert_close(model.second.bias.grad, torch.full((8,), 4.0, device=DEVICE))
