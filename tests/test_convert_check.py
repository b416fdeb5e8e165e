"""`check` and the command `convert-check`."""

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import ckpt_kernels
from ckpt_kernels.check import check
from ckpt_kernels.cli import main
from ckpt_kernels.model_steps import another_batch
from ckpt_kernels.nested_values import tensors_in

from .conftest import DEVICE
from .conversion import WIDTH, mlps, random_tensor
from .test_convert_rules import IMAGE, BasicBlock, block


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    return nn.Sequential(mlps(), nn.Dropout(0.1)), (torch.randn(64, WIDTH),)


def test_check_reports_errors_and_does_not_change_the_model() -> None:
    model, inputs = block(), {"input": random_tensor(*IMAGE)}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    found = check(model, inputs, turns=1)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert type(model) is BasicBlock and model.training
    assert found.mode == "training" and found.kept[1] < found.kept[0] and min(found.seconds) > 0
    for errors in found.errors:
        assert 0 < errors.eager < 1e-5 and errors.converted <= 1.5 * errors.eager + 1e-7
        assert errors.difference <= errors.eager + errors.converted


def test_check_command(capsys: pytest.CaptureFixture) -> None:
    assert main(["convert-check", "tests.test_convert_check:example", "--turns", "1"]) == 0
    text = capsys.readouterr().out
    for words in ("layer_norm", "in evaluation mode", "gradients", "kept for backward", "peak", "time"):
        assert words in text


def test_check_needs_a_gradient() -> None:
    with pytest.raises(ValueError, match=r"outputs have no gradient"):
        check(mlps().to(DEVICE).requires_grad_(False), (random_tensor(3, WIDTH),))


class Noisy(nn.Module):
    """Draws numbers of two generators in both modes. With `writes`, also writes past autograd to what it reads, a
    documented difference: the gradients of the converted model are other numbers."""

    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.writes = writes

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.randn_like(x) + torch.empty_like(x).uniform_() * random.random()
        h = self.norm(x)
        y = self.first(h)
        if self.writes:
            h.data[:, 0] = 3.0
        return y + self.second(h)


def test_random_numbers_in_evaluation_mode_hide_nothing() -> None:
    inputs = (random_tensor(16, WIDTH),)
    for writes in (False, True):
        found = check(Noisy(writes).to(DEVICE), inputs, turns=1)
        assert found.mode == "evaluation"
        assert all(errors.eager < 1e-5 for errors in found.errors)
        assert [change.partition(" are")[0] for change in found.changed] == (["gradients"] if writes else [])


def test_an_empty_batch_has_no_differences() -> None:
    found = check(mlps().to(DEVICE), (random_tensor(0, WIDTH),), turns=1)
    assert found.changed == []
    assert {errors.worst for errors in found.errors} == {"none has elements", "grad 0.0.weight"}


class WrongAtTheSecondCall(nn.Module):
    """Computes other numbers from the second call on if the norm is converted."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("calls", torch.zeros(()))
        self.noise = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = x + self.noise * torch.randn_like(x) if self.noise else x
        kind = getattr(self.norm, "".join(("__cla", "ss__")))  # no analysis of the source finds that
        factor = 1.01 if self.calls > 1 and kind is not nn.LayerNorm else 1.0
        return self.linear(self.norm(x)) * factor


@pytest.mark.parametrize("noise", (0.0, 0.5))
def test_numbers_of_the_second_call_are_compared(noise: float) -> None:
    model = WrongAtTheSecondCall().to(DEVICE)
    model.noise = noise
    found = check(model, (random_tensor(16, WIDTH),), turns=1)
    assert [(change.split()[0], change[-6:]) for change in found.changed] == [
        ("outputs", "call 2"),
        ("gradients", "call 2"),
    ]


class Counts(nn.Module):
    """Counts its calls in a buffer and in an attribute, draws numbers, and returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("steps", torch.zeros(()))
        self.calls = 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        self.steps += 1
        numpy.random.rand()
        return self.linear(self.norm(x)), None


def second(model: nn.Module, output: Any) -> Any:
    return (output[0] * 1.01, None) if model.calls > 1 else output


# What each faulty conversion does after a call, and a part of the message.
FAULTS: dict[str, tuple[Callable[[nn.Module, Any], Any], str]] = {
    "none": (lambda model, output: output, ""),
    "a buffer": (lambda model, output: (model.steps.add_(1), output)[1], "steps is another afterwards"),
    "an attribute": (lambda model, output: (setattr(model, "calls", 9), output)[1], "calls is another afterwards"),
    "torch's generator": (
        lambda model, output: (torch.rand(()), output)[1],
        "random numbers are drawn otherwise, call 1",
    ),
    "Python's generator": (lambda model, output: (random.random(), output)[1], "random numbers are drawn otherwise"),
    "numpy's generator": (lambda model, output: (numpy.random.rand(), output)[1], "random numbers are drawn otherwise"),
    "the type of the output": (lambda model, output: list(output), "returns"),
    "a dtype": (lambda model, output: (output[0].double(), None), "output 0 is torch.float64"),
    "the numbers": (lambda model, output: (output[0] * 1.01, None), "outputs are other numbers"),
    "the numbers from the second call on": (second, "call 2"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("rows", (1, 16))
def test_faulty_conversions_are_found(fault: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    after, message = FAULTS[fault]

    def faulty(model: nn.Module, recompute: str) -> Any:
        report = ckpt_kernels.convert(model, recompute=recompute)
        kind = type(model)
        model.__class__ = type(kind.__name__, (kind,), {"forward": lambda self, x: after(self, kind.forward(self, x))})
        return report

    monkeypatch.setattr("ckpt_kernels.check.convert", faulty)
    torch.manual_seed(0)
    found = check(Counts().to(DEVICE), (random_tensor(rows, WIDTH),), turns=1)
    assert any(message in change for change in found.changed) if message else not found.changed, found.changed
    if fault == "the numbers from the second call on":
        assert all(change.endswith("call 2") for change in found.changed)


def test_the_second_batch_has_other_values() -> None:
    ids, mask = torch.tensor([[3, 1, 2, 2]]), torch.ones(1, 4, dtype=torch.bool)
    for first in (
        (torch.randn(4, 8),),
        (torch.randn(8),),
        {"one sample": torch.randn(1, 8), "flag": True, "time": torch.tensor(3)},
        {"equal samples": torch.randn(1, 1, 8).expand(4, 3, 8)},
        {"ids": ids, "mask": mask, "nested": [torch.randn(1, 2), {"none": None}]},
        (torch.zeros(1, 8), ids[:, 2:]),
        (torch.full((), 3.0), mask),
        [torch.randn(3, 4, 4)],
    ):
        second = another_batch(first)
        pairs = list(zip(tensors_in(first), tensors_in(second), strict=True))
        assert type(first) is type(second) and any(not torch.equal(one, other) for one, other in pairs)
        for one, other in pairs:
            assert one.shape == other.shape and one.dtype == other.dtype
            if not one.is_floating_point():
                assert torch.equal(one.flatten().sort().values, other.flatten().sort().values)
    assert another_batch((mask,))[0] is mask
    assert another_batch((ids,))[0].tolist() == [[2, 3, 1, 2]]
    # Integers beside the values of one sample may be sizes.
    sizes = torch.tensor([[4, 6]])
    assert torch.equal(another_batch((torch.randn(1, 4, 6), sizes))[1], sizes)


@dataclasses.dataclass
class Result:
    """What a model returns."""

    sample: Tensor
    count: int = 1


class OfDataclass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = mlps()

    def forward(self, x: Tensor) -> Result:
        return Result(self.inner(x))


class InFloat32(OfDataclass):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.ones_like(x, dtype=torch.float32))


def test_check_finds_tensors_in_dataclasses() -> None:
    found = check(OfDataclass().to(DEVICE), (random_tensor(3, WIDTH),), turns=1)
    assert all(0 < errors.eager < 1e-5 for errors in found.errors)


def test_check_names_the_cause_where_a_model_does_not_run_in_float64() -> None:
    with pytest.raises(ValueError, match=r"model does not run in float64: .*; expected a model that takes the dtype"):
        check(InFloat32().to(DEVICE), (random_tensor(3, WIDTH),), turns=1)
