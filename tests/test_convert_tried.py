"""Modules that a trial recognised, and guards of call sites: everything they read is read again at every call, once."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import silu as swish
from torch.nn.utils import parametrizations, parametrize

import ckpt_kernels
from ckpt_kernels.convert import Report

from .conftest import DEVICE
from .conversion import WIDTH, close, kept, random_tensor, results_of, twins


def rows() -> Tensor:
    return random_tensor(6, WIDTH)


def found_in(report: Report) -> dict[str, str]:
    return {entry.name: entry.by for entry in report.replaced if "discard_outputs" not in entry.by}


def slope(x: Tensor, steepness: float = 1.0) -> Tensor:
    return x * torch.sigmoid(steepness * x)


class Sloped(nn.Module):
    """A silu by a function of the file with a default argument, all of which may change."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = [1, 2]

    def forward(self, x: Tensor) -> Tensor:
        return slope(x) if self.steps else x


class Patched(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x)


def enclosed() -> tuple[nn.Module, Callable[[], None]]:
    """A module that calls a variable of the enclosing function, and a function that rebinds the variable."""

    def act(x: Tensor) -> Tensor:
        return F.silu(x)

    class Enclosed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return act(x)

    def change() -> None:
        nonlocal act
        act = F.relu

    return Enclosed(), change


def changed(how: str, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, Callable[[], None]]:
    """A module that computes silu, and a change after which it does not."""
    if how == "variable":
        return enclosed()
    if how == "function of torch":
        return Patched(), lambda: monkeypatch.setattr(F, "silu", F.relu)
    module = Sloped()
    return module, {
        "default": lambda: monkeypatch.setattr(slope, "__defaults__", (3.0,)),
        "code": lambda: monkeypatch.setattr(slope, "__code__", (lambda x, steepness=1.0: x + steepness).__code__),
        "global": lambda: monkeypatch.setitem(globals(), "slope", F.relu),
        "list": lambda: module.steps.clear(),
        "type of a setting": lambda: setattr(module, "steps", torch.zeros(2, 2)[0, :1]),
    }[how]


CHANGES = ("variable", "function of torch", "default", "code", "global", "list", "type of a setting")


@pytest.mark.parametrize("how", CHANGES)
def test_changes_of_a_tried_module_are_detected(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, change = changed(how, monkeypatch)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), module).to(DEVICE)
    report = ckpt_kernels.convert(model)
    assert found_in(report) == {"1": "bias_act (silu)"}
    assert "bias_act" in type(model(rows()).grad_fn).__name__
    change()
    changed_output = model(rows())
    ckpt_kernels.revert(model)
    assert torch.equal(changed_output, model(rows()))


def is_converted_by_itself(module: nn.Module) -> bool:
    """Whether the module's forward at least runs within `discard_outputs`."""
    model = nn.ModuleList([module])
    ckpt_kernels.convert(model)
    found = ckpt_kernels.is_converted(module)
    ckpt_kernels.revert(model)
    return found


def test_mutable_defaults_are_read_at_every_call() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, scale=[1.0]) -> Tensor:  # noqa: B006
            return F.silu(x) * scale[0]

    module = Scaled()
    assert is_converted_by_itself(module)
    ckpt_kernels.convert(nn.Sequential(module))
    Scaled.forward.__defaults__[0][0] = 3.0
    torch.testing.assert_close(module(rows()), 3 * F.silu(rows()))


def test_an_unbound_variable_is_no_error() -> None:
    class Early(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return later(x)

    report = ckpt_kernels.convert(nn.Sequential(Early(), nn.GELU()))
    assert found_in(report) == {"1": "bias_act (gelu)"}

    def later(x: Tensor) -> Tensor:
        return x


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.product(x))

    def product(self, x: Tensor) -> Tensor:
        return self.act(self.gate(x)) * self.up(x)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        total = x + self.gate(x)
        return total + self.norm(total)


@pytest.mark.parametrize(("kind", "part"), [(Gated, "gate"), (Normed, "gate"), (Normed, "norm")])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_parametrized_weight_is_computed_once(kind: type[nn.Module], part: str, when: str) -> None:
    made = []

    class Counted(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            made.append(weight)
            return weight * 1.5

    model = kind().to(DEVICE)
    if when == "after":
        ckpt_kernels.convert(model)
    parametrize.register_parametrization(getattr(model, part), "weight", Counted())
    if when == "before":
        ckpt_kernels.convert(model)
    made.clear()
    model(rows())
    assert len(made) == 1


def test_spectral_norm_takes_the_same_steps() -> None:
    model, converted = twins(Gated)
    for module in (model, converted):
        torch.manual_seed(1)
        parametrizations.spectral_norm(module.gate)
    ckpt_kernels.convert(converted)
    for _ in range(3):
        assert close(results_of(converted, rows()), results_of(model, rows()))
    for (name, buffer), other in zip(model.named_buffers(), converted.buffers(), strict=True):
        assert torch.equal(buffer, other), name


class Two(nn.Module):
    """Two linear layers with an activation in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.hidden(self.first(x)))


class QuickGELU(Two):
    def hidden(self, y: Tensor) -> Tensor:
        return y * torch.sigmoid(1.702 * y)


class SiLU(Two):
    def hidden(self, y: Tensor) -> Tensor:
        return y * torch.sigmoid(y)


class Mish(Two):
    def hidden(self, y: Tensor) -> Tensor:
        return y * torch.tanh(F.softplus(y))


class Dropped(Two):
    def hidden(self, y: Tensor) -> Tensor:
        return F.dropout(torch.relu(y), 0.1, self.training)


class SigmoidGate(Two):
    def hidden(self, y: Tensor) -> Tensor:
        return torch.sigmoid(self.last(y)) * y


class Renamed(Two):
    def hidden(self, y: Tensor) -> Tensor:
        return swish(y) * y


@pytest.mark.parametrize(
    "kind,found",
    [
        (QuickGELU, "bias_act (quick_gelu); MLP"),
        (SiLU, "bias_act (silu); MLP"),
        (Mish, "bias_act (mish); MLP"),
        (Dropped, "dropout"),
        (SigmoidGate, ""),
        (Renamed, "gate"),
    ],
)
def test_the_report_names_the_pattern_that_is_fused(kind: type[nn.Module], found: str) -> None:
    """A pattern whose guard would always fail does not hide another pattern."""
    model = kind().to(DEVICE)
    eager = kept(model, rows())
    report = ckpt_kernels.convert(model, recompute="block")
    assert found_in(report) == ({"": found} if found else {})
    assert kept(model, rows()) < eager or not found


class Differentiates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        def energy(t: Tensor) -> Tensor:
            return t.square().sum()

        return F.gelu(self.linear(x)) + torch.func.grad(energy)(x)


def test_transforms_within_a_rewritten_method() -> None:
    model, converted = twins(Differentiates)
    assert found_in(ckpt_kernels.convert(converted)) == {"": "bias_act (gelu)"}
    assert close(results_of(converted, rows()), results_of(model, rows()))


class RMS(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def test_a_probability_out_of_range_is_torchs_error() -> None:
    model = nn.Sequential(nn.GELU(), nn.Dropout(0.1))
    ckpt_kernels.convert(model)
    model[1].p = 1.5
    with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1"):
        model(rows())
