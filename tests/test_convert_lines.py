"""Debuggers and tracebacks see the lines of a rewritten method as those of the original."""

import sys
import traceback
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

import ckpt_kernels

from .conftest import DEVICE
from .conversion import INNER, WIDTH, random_tensor


class Runs(nn.Module):
    """Runs of statements that become one call each, selected by `how`."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.norm, self.act = nn.LayerNorm(WIDTH), nn.SiLU()
        self.limit = 2.0
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.how)(x)

    def residual(self, x: Tensor) -> Tensor:
        h = self.down(self.act(self.gate(x)))
        y = self.norm(x + h)
        z = y * 2
        return z

    def sum_kept(self, x: Tensor) -> Tensor:
        x = x + self.down(self.gate(x))
        kept = x
        y = self.norm(x)
        return y * 2 + kept

    def norm_and_act(self, x: Tensor) -> Tensor:
        y = self.gate(x)
        y = self.down(y)
        y = self.norm(y)
        y = self.act(y)
        return self.up(y)

    def in_a_loop(self, x: Tensor) -> Tensor:
        for _ in range(2):
            h = self.down(self.gate(x))
            x = self.norm(x + h)
        if x.dim() > 1:
            h = self.norm(x)
            h = self.act(h)
        return h

    # fmt: off
    def over_lines(self, x: Tensor) -> Tensor:
        h = self.down(
            self.gate(
                x
            )
        )
        h = self.norm(
            x
            + h
        )
        h = (
            self.act(
                self.norm(
                    self.down(self.gate(h))
                )
            )
        )
        return self.down(
            self.act(self.gate(h))
            * self.up(h)
        )
    # fmt: on

    def gated(self, x: Tensor) -> Tensor:
        gate = self.act(self.gate(x))
        value = self.up(x)
        product = gate * value
        return self.down(product)

    def halves(self, x: Tensor) -> Tensor:
        packed = self.gate(x)
        first, second = packed.chunk(2, dim=-1)
        first = first.clamp(max=self.limit)
        y = self.act(first) * second
        return y


HOW = ("residual", "sum_kept", "norm_and_act", "in_a_loop", "gated", "halves")


def lines_of(model: nn.Module, x: Tensor, how: str) -> list[int]:
    """The lines at which a debugger stops in the method, relative to the first one."""
    lines: list[int] = []

    def trace(frame: Any, event: str, _: Any) -> Any:
        code = frame.f_code
        if (code.co_filename, code.co_name) != (__file__, how):
            return None
        if event == "line":
            lines.append(frame.f_lineno - code.co_firstlineno)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        model(x)
    finally:
        sys.settrace(before)
    return lines


def converted(how: str) -> nn.Module:
    model = Runs(how).to(DEVICE)
    report = ckpt_kernels.convert(model, recompute="block")
    assert any(entry.kind == "Runs" for entry in report.replaced)
    return model


def hooked(model: nn.Module) -> None:
    """Makes the guards of all fused calls refuse."""
    for child in model.children():
        child.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("change", (lambda model: None, hooked), ids=("fused", "as written"))
@pytest.mark.parametrize("how", HOW)
def test_debuggers_stop_once_at_each_line(how: str, change: Callable[[nn.Module], None]) -> None:
    model, x = converted(how), random_tensor(3, WIDTH)
    change(model)
    assert lines_of(model, x, how) == lines_of(Runs(how).to(DEVICE), x, how)


@pytest.mark.parametrize("change", (lambda model: None, hooked), ids=("fused", "as written"))
def test_debuggers_reach_all_lines_of_long_expressions(change: Callable[[nn.Module], None]) -> None:
    model, x = converted("over_lines"), random_tensor(3, WIDTH)
    change(model)
    ours, theirs = lines_of(model, x, "over_lines"), lines_of(Runs("over_lines").to(DEVICE), x, "over_lines")
    assert list(dict.fromkeys(ours)) == list(dict.fromkeys(theirs))


@pytest.mark.parametrize("missing", ("norm", "act", "down", "gate"))
@pytest.mark.parametrize("how", ("residual", "norm_and_act", "gated"))
def test_a_missing_attribute_is_missed_at_its_line(how: str, missing: str) -> None:
    errors = []
    model = converted(how)
    for which in (model, Runs(how).to(DEVICE)):
        delattr(which, missing)
        try:
            which(random_tensor(3, WIDTH))
        except AttributeError as error:
            steps = traceback.extract_tb(error.__traceback__)
            errors.append([step.lineno for step in steps if (step.filename, step.name) == (__file__, how)])
        else:
            errors.append([])
    assert errors[0] == errors[1] and (errors[0] or missing == "norm")
