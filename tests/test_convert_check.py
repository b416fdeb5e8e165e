"""`check` and the command `convert-check`."""

import random

import pytest
import torch
from torch import Tensor, nn

from ckpt_kernels.check import check
from ckpt_kernels.cli import main

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
