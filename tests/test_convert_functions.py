"""Activations that are functions in a user's file: trials recognise them."""

import copy
import functools
import io
import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ckpt_kernels
from ckpt_kernels.memory import saved_bytes

from .conftest import DEVICE

WIDTH = 32
calls: list[int] = []
beta = 1.0


def own_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def own_silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def cubed(x: Tensor) -> Tensor:
    return x * x * x


def counted(x: Tensor) -> Tensor:
    calls.append(1)
    return x * torch.sigmoid(x)


def with_a_global(x: Tensor) -> Tensor:
    return x * torch.sigmoid(beta * x)


class Gated(nn.Module):
    """A gated MLP that holds a function as the activation."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate, self.value = (nn.Linear(WIDTH, 4 * WIDTH, bias=False) for _ in range(2))
        self.last = nn.Linear(4 * WIDTH, WIDTH, bias=False)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.gate(x)) * self.value(x))


class GatedByName(nn.Module):
    """A gated MLP that calls a function of the file by name."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.value = (nn.Linear(WIDTH, 4 * WIDTH, bias=False) for _ in range(2))
        self.last = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(own_gelu(self.gate(x)) * self.value(x))


class Plain(nn.Module):
    """An MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(own_gelu(self.first(x)))


class ByMethod(Plain):
    """An MLP whose activation is in a method that names no child."""

    def act(self, h: Tensor) -> Tensor:
        return own_silu(h)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.first(x)))


class HelperGate(nn.Module):
    """A gate whose activation is a method that reads a setting, and asks for a device that no fused function takes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 8 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.approximate = "tanh"

    def gelu(self, gate: Tensor) -> Tensor:
        if gate.device.type == "mps" and calls:
            return F.gelu(gate.to(dtype=torch.float32)).to(dtype=gate.dtype)
        return F.gelu(gate, approximate=self.approximate)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x, gate = x.chunk(2, dim=-1)
        return self.last(x * self.gelu(gate))


class AsksForCUDA(HelperGate):
    def gelu(self, gate: Tensor) -> Tensor:
        if gate.device.type == "cuda":
            return F.gelu(-gate)
        return F.gelu(gate)


class AsksForADeviceOfItsOwn(HelperGate):
    device = torch.device("cpu")

    def gelu(self, gate: Tensor) -> Tensor:
        if self.device.type == "mps":
            return gate
        return F.gelu(gate)


class OwnGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return own_gelu(x)


class Writing(Plain):
    """An MLP that writes to the input of the activation, of which torch saves scaled copies only."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        output = self.last(self.act(h))
        h.zero_()
        return output


class OnlyFunction(nn.Module):
    """A module without children, which the conversion does not try because of the second argument."""

    def forward(self, x: Tensor, shift: float) -> Tensor:
        return own_silu(x) + shift


class Held(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.function = own_silu

    def act(self, h: Tensor) -> Tensor:
        return self.function(h)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.first(x)))


class Ramp(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.hardtanh(self.first(x), 0.0, 6.0))


class WrittenHardswish(Plain):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = h * F.relu6(h + 3.0) / 6.0
        return self.last(h)


class Halves(nn.Module):
    """An MLP with a packed gate."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 8 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.first(x).chunk(2, dim=-1)
        return self.last(own_gelu(gate) * value)


@pytest.fixture
def rows() -> Iterator[Tensor]:
    calls.clear()
    torch.manual_seed(0)
    yield torch.randn(16, WIDTH, device=DEVICE)


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().clone().requires_grad_()
    output = model(x)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), [x, *model.parameters()])]


def check(made: Callable[[], nn.Module], x: Tensor, said: str, units: int) -> nn.Module:
    """Converts the model and checks that the saved bytes are `units` times those of x.

    The kept tensors are the inputs of products, and the operands of the activation or gate. One level is enough: every
    level discards the intermediates of blocks.
    """
    model = made().to(DEVICE)
    eager = copy.deepcopy(model)
    report = ckpt_kernels.convert(model, recompute="block")
    assert [entry.by for entry in report.replaced] == [said]
    for found, expected in zip(results(model, x), results(eager, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert saved_bytes(model, x) == units * x.nbytes <= 0.65 * saved_bytes(eager, x)
    return model


@pytest.mark.parametrize(
    ("made", "said", "units"),
    [
        (GatedByName, "gated MLP", 13),
        (lambda: Gated(own_gelu), "gated MLP", 13),
        (lambda: Gated(own_silu), "gated MLP", 13),
        (Plain, "MLP", 9),
        (WrittenHardswish, "MLP", 9),
        (Halves, "packed gated MLP", 13),
    ],
)
def test_functions_of_the_file_are_activations(
    made: Callable[[], nn.Module], said: str, units: int, rows: Tensor
) -> None:
    check(made, rows, said, units)


@pytest.mark.parametrize("made", [ByMethod, Held])
def test_methods_that_name_no_child_are_read(made: Callable[[], nn.Module], rows: Tensor) -> None:
    model = made().to(DEVICE)
    eager = copy.deepcopy(model)
    report = ckpt_kernels.convert(model)
    assert [entry.by for entry in report.replaced] == ["bias_act (silu); MLP"]
    for found, expected in zip(results(model, rows), results(eager, rows), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # The input of the first product and the input of the activation.
    assert saved_bytes(model, rows) == 5 * rows.nbytes


def compared(model: nn.Module, eager: nn.Module, x: Tensor) -> int:
    """The saved bytes of a model whose results are those of its eager copy."""
    for found, expected in zip(results(model, x), results(eager, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    return saved_bytes(model, x)


@pytest.mark.parametrize("level", ["block", "output"])
def test_methods_of_the_module_are_activations(level: str, rows: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = HelperGate().to(DEVICE)
    eager = copy.deepcopy(model)
    ckpt_kernels.convert(model, recompute=level)
    units = {"block": 13, "output": 9}[level]
    assert compared(model, eager, rows) == units * rows.nbytes
    # The setting, the method of the object and that of the class are read at each call.
    model.approximate = eager.approximate = "none"
    compared(model, eager, rows)
    model.gelu = eager.gelu = own_silu
    compared(model, eager, rows)
    del model.gelu, eager.gelu
    decorated = functools.wraps(type(model).gelu)(lambda self, gate: own_silu(gate))
    monkeypatch.setattr(HelperGate, "gelu", decorated)
    compared(model, eager, rows)
    monkeypatch.undo()
    type(model).gelu = decorated
    monkeypatch.setattr(HelperGate, "gelu", decorated)
    compared(model, eager, rows)


def test_a_method_of_the_converted_class_may_be_patched(rows: Tensor) -> None:
    model = HelperGate().to(DEVICE)
    eager = copy.deepcopy(model)
    ckpt_kernels.convert(model)
    kind = type(model)
    kind.gelu = functools.wraps(kind.gelu)(lambda self, gate: own_silu(gate))
    eager.gelu = own_silu
    compared(model, eager, rows)


def test_a_patch_of_a_converted_class_reaches_no_later_conversion(rows: Tensor) -> None:
    model, eager = HelperGate().to(DEVICE), HelperGate().to(DEVICE)
    eager.load_state_dict(model.state_dict())
    ckpt_kernels.convert(model)
    patched = type(model)
    patched.gelu = lambda self, gate: own_silu(gate)
    ckpt_kernels.revert(model)
    ckpt_kernels.convert(model)
    assert type(model) is not patched
    compared(model, eager, rows)


@pytest.mark.parametrize("kind", [AsksForCUDA, AsksForADeviceOfItsOwn])
def test_a_device_may_decide(kind: type[HelperGate], rows: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = kind().to(DEVICE)
    eager = copy.deepcopy(model)
    ckpt_kernels.convert(model)
    monkeypatch.setattr(AsksForADeviceOfItsOwn, "device", torch.device("mps"))
    compared(model, eager, rows)


@pytest.mark.parametrize("act", [own_gelu, OwnGELU()])
@pytest.mark.parametrize("level", ["block", "output"])
def test_a_copy_stands_for_an_input_that_torch_does_not_save(
    act: Callable[[Tensor], Tensor], level: str, rows: Tensor
) -> None:
    model = Writing(copy.deepcopy(act)).to(DEVICE)
    eager = copy.deepcopy(model)
    report = ckpt_kernels.convert(model, recompute=level)
    assert [entry.by for entry in report.replaced] == ["bias_act (gelu)"]
    for found, expected in zip(results(model, rows), results(eager, rows), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    units = {"block": 9, "output": 5}[level]
    assert saved_bytes(model, rows) == units * rows.nbytes <= 0.65 * saved_bytes(eager, rows)


def test_a_module_without_children_is_read(rows: Tensor) -> None:
    model = OnlyFunction()
    rows.requires_grad_()
    expected = model(rows, 2.0)
    assert [entry.by for entry in ckpt_kernels.convert(model).replaced] == ["bias_act (silu)"]
    torch.testing.assert_close(model(rows, 2.0), expected)
    assert saved_bytes(model, rows, 2.0) == rows.nbytes


def test_torchs_hardtanh_is_recognised_by_its_arguments(rows: Tensor) -> None:
    model = Ramp().to(DEVICE)
    eager = copy.deepcopy(model)
    report = ckpt_kernels.convert(model, recompute="all")
    assert [entry.by for entry in report.replaced] == ["MLP"]
    for found, expected in zip(results(model, 4 * rows), results(eager, 4 * rows), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert saved_bytes(model, rows) == rows.nbytes


@pytest.mark.parametrize("act", [cubed, counted, lambda x: x * torch.sigmoid(x)])
def test_unrecognised_functions_run(act: Callable[[Tensor], Tensor], rows: Tensor) -> None:
    model = Gated(act).to(DEVICE)
    assert not ckpt_kernels.convert(model, recompute="block").replaced
    assert not calls
    model(rows)
    assert len(calls) == (act is counted)


def test_a_replaced_function_runs(rows: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = check(GatedByName, rows, "gated MLP", 13)
    monkeypatch.setitem(GatedByName.forward.__globals__, "own_gelu", counted)
    model(rows)
    assert calls


def test_replaced_code_runs(rows: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = check(lambda: Gated(own_gelu), rows, "gated MLP", 13)
    monkeypatch.setattr(own_gelu, "__code__", counted.__code__)
    model(rows)
    assert calls


def test_a_changed_global_of_the_function_is_read(rows: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = check(lambda: Gated(with_a_global), rows, "gated MLP", 13)
    monkeypatch.setitem(with_a_global.__globals__, "beta", 1.5)
    expected = model.last(with_a_global(model.gate(rows)) * model.value(rows))
    torch.testing.assert_close(model(rows), expected, rtol=0, atol=0)


def test_copies_are_fused_too(rows: Tensor) -> None:
    model = check(lambda: Gated(own_gelu), rows, "gated MLP", 13)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert ckpt_kernels.is_converted(other)
        assert saved_bytes(other, rows) == saved_bytes(model, rows)
        torch.testing.assert_close(other(rows), model(rows))


def test_torch_compile_with_a_method(rows: Tensor) -> None:
    model = HelperGate().to(DEVICE)
    eager = copy.deepcopy(model)
    ckpt_kernels.convert(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(rows), eager(rows), rtol=1e-4, atol=1e-4)


def test_torch_compile(rows: Tensor) -> None:
    model = GatedByName().to(DEVICE)
    ckpt_kernels.convert(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = model.last(F.gelu(model.gate(rows)) * model.value(rows))
    torch.testing.assert_close(compiled(rows), expected)
