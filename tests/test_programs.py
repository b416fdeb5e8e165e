"""Generated models give the same results when converted. The last tests check that the comparison detects faults."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckpt_kernels
from ckpt_kernels.convert import Report

from .programs import run, write
from .programs.actions import LEVELS, Step
from .programs.grammar import Program

CHUNKS, EACH = 20, 15


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_generated_programs_give_the_same_results(chunk: int, tmp_path: Path) -> None:
    results = [run(write(seed), LEVELS[seed % 3], tmp_path) for seed in range(chunk * EACH, (chunk + 1) * EACH)]
    failed = [result for result in results if result.differences]
    assert not failed, "\n\n".join(map(str, failed))
    assert sum(bool(result.raised) for result in results) <= EACH // 2
    assert sum(bool(result.replaced) for result in results) >= EACH // 2


def test_programs_are_reproducible_and_distinct() -> None:
    assert write(5) == write(5)
    assert len({write(seed).source for seed in range(50)}) == 50


# Faulty conversions, with one fault each.


def _changed(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Gives a module another forward by a new class, as `convert` does."""
    kind = type(module)
    members = {"forward": forward, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    module.__class__ = type(kind.__name__, (kind,), members)


def _imprecise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.GELU | nn.SiLU | nn.LayerNorm):
            _changed(module, lambda self, x: 1.001 * super(type(self), self).forward(x))


def _wrong_gradient(model: nn.Module) -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 1.01 * grad

    for module in model.modules():
        if isinstance(module, nn.Linear):
            _changed(module, lambda self, x: Wrong.apply(super(type(self), self).forward(x)))


def _around(before: Callable[[nn.Module], Any], after: Callable[[nn.Module, Any, Any], Any]) -> Callable:
    """A conversion that calls `before` ahead of the model's forward, and returns the result of `after`."""

    def break_(model: nn.Module) -> None:
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            held = before(self)
            return after(self, held, super(type(self), self).forward(*args, **kwargs))

        _changed(model, forward)

    return break_


def _forgotten(model: nn.Module, held: int, output: Any) -> Any:
    model.counter = held
    return output


def _drawn(model: nn.Module, held: None, output: Any) -> Any:
    torch.rand(())
    return output


WRONG: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "values": (_imprecise, "values of up to"),
    "gradients": (_wrong_gradient, "gradients"),
    "a list for a tuple": (
        _around(lambda m: None, lambda m, held, out: list(out) if type(out) is tuple else out),
        "list",
    ),
    "a forgotten attribute": (_around(lambda m: m.counter, _forgotten), "counter"),
    "a random number": (_around(lambda m: None, _drawn), "generators"),
    "a copy of what was passed on": (
        _around(lambda m: None, lambda m, held, out: out.clone() if isinstance(out, Tensor) else out),
        "are the same",
    ),
    "training": (_around(lambda m: m.train(), lambda m, held, out: out), "training"),
    "a buffer": (_around(lambda m: m.steps.add_(1), lambda m, held, out: out), "buffers"),
    "an error": (_around(lambda m: m.missing, lambda m, held, out: out), "raised"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrong", WRONG)
def test_faulty_conversions_are_detected(wrong: str, tmp_path: Path) -> None:
    break_, message = WRONG[wrong]

    def convert(model: nn.Module, recompute: str) -> SimpleNamespace:
        break_(model)
        return SimpleNamespace(replaced=[])

    results = (run(write(seed), "output", tmp_path, convert) for seed in range(40))
    assert any(message in difference for result in results for difference in result.differences)


_WRITES_TO_A_SUM = """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.last = nn.RMSNorm(8), nn.Linear(8, 8, bias=False)
        self.shift, self.writes = nn.Parameter(torch.full((8,), 0.3)), True

    def forward(self, x):
        h = self.norm(x) + self.shift
        if self.writes:
            h *= h
        return self.last(h)
"""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("factor", (1.0, 1.01))
def test_an_error_of_eager_torch_alone_leaves_no_gradients(factor: float, tmp_path: Path) -> None:
    steps = [Step("model(x)", 3), Step("model.writes = False"), Step("model(x)", 3)]

    def convert(model: nn.Module, recompute: str) -> Report:
        report = ckpt_kernels.convert(model, recompute=recompute)
        if factor != 1.0:
            _changed(model.last, lambda self, h: factor * super(type(self), self).forward(h))
        return report

    result = run(Program(0, _WRITES_TO_A_SUM, (8,), tuple(steps)), "output", tmp_path, convert)
    assert result.lenient and result.raised == ["backward RuntimeError"]
    # Without a fault all steps are taken; a fault is found in the lenient step itself.
    assert bool(result.differences) == (factor != 1.0) and result.step == str(steps[0 if result.differences else 2])
