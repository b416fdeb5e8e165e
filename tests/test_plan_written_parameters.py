"""Plans of models whose forward writes to its own parameters: planning leaves the model as it was."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ckpt_kernels import plan
from ckpt_kernels.plan.written_parameters import parameters_written_by

WIDTH = 8


class Codebook(nn.Module):
    """A layer with rows that follow the data."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.last = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.codes = nn.Parameter(torch.randn(5, WIDTH), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        with torch.no_grad():
            nearest = torch.cdist(h, self.codes).argmin(-1)
            self.codes[nearest] = self.codes[nearest].lerp(h, 0.5)
        return x + self.last(torch.relu(self.first(h + self.codes[nearest] - h.detach())))


def test_planning_leaves_written_parameters_as_they_were() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Codebook() for _ in range(2)))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    plan(model, torch.randn(4, WIDTH), budget=None, progress=lambda line: None)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


WRITES: dict[str, Callable[[nn.Parameter], object]] = {
    "in place": lambda p: p.add_(1),
    "a view": lambda p: p[1:].zero_(),
    "out=": lambda p: torch.add(p, 1, out=p),
    "data": lambda p: p.data.mul_(2),
    "several": lambda p: torch._foreach_add_([p], 1),
    "an error": lambda p: p.add_(1).view(-1, 7),
}


@pytest.mark.parametrize("name", WRITES)
def test_written_parameters_are_found_and_restored(name: str) -> None:
    written, read = (nn.Parameter(torch.arange(4.0), requires_grad=False) for _ in range(2))
    found = []
    if name == "an error":
        with pytest.raises(RuntimeError):
            parameters_written_by(lambda: WRITES[name](written), [written, read])
    else:
        found = parameters_written_by(lambda: (WRITES[name](written), read + 1), [written, read])
        assert len(found) == 1 and found[0] is written
    assert torch.equal(written, torch.arange(4.0)) and torch.equal(read, torch.arange(4.0))


def test_all_parameters_of_written_memory_are_found() -> None:
    memory = torch.arange(4.0)
    halves = [nn.Parameter(half, requires_grad=False) for half in memory.split(2)]
    found = parameters_written_by(lambda: halves[1].add_(1), halves)
    assert len(found) == 2 and all(one is half for one, half in zip(found, halves, strict=True))
    assert torch.equal(memory, torch.arange(4.0))


def test_operators_without_a_schema_are_called() -> None:
    x = torch.ones(3)
    written = nn.Parameter(torch.zeros(3), requires_grad=False)
    forward = lambda: torch.cond(x.sum() > 0, lambda a: a.sin(), lambda a: a.cos(), (x,)) + written.add_(1)  # noqa: E731
    assert parameters_written_by(forward, [written]) == [written]
    assert torch.equal(written, torch.zeros(3))
