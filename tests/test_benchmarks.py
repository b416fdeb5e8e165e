"""The benchmarks' evaluation: changes beyond noise, means, the largest batch, and plans compared with checkpoints."""

import argparse
import json
import pathlib
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("rich", reason="rich is not installed")

from benchmarks import baseline, plan, report, sweep
from benchmarks.cases import CASES, Setting
from benchmarks.measure import measure
from benchmarks.models import Run, largest_batch
from ckpt_kernels.levels import OF_MODELS
from ckpt_kernels.memory import saved_bytes


def result(provider: str, total_ms: float, spread: float = 0.01, case: str = "rms_norm+silu") -> dict[str, Any]:
    names = {"case": case, "shape": "4096x1024", "dtype": "float32", "provider": provider}
    return names | {"total_ms": total_ms, "spread": spread, "copy_ms": 1.0, "times_floor": 1.0}


def test_changes_within_the_noise_are_marked() -> None:
    before = [result("ours", 1.0), result("eager", 1.0), result("compile", 1.0, 0.1), result("gone", 1.0)]
    now = [result("ours", 1.2), result("eager", 1.08), result("compile", 1.3, 0.01), result("new", 9.0)]
    found = {move.name.split()[-1]: move for move in baseline.moves(before, now)}
    assert list(found) == ["compile", "ours", "eager"]
    assert found["ours"].beyond_noise and not found["eager"].beyond_noise and not found["compile"].beyond_noise
    assert found["compile"].noise == pytest.approx(0.05 + 3 * 0.11)
    (faster,) = baseline.moves([result("ours", 1.2)], [result("ours", 1.0)])
    assert faster.beyond_noise and faster.ratio < 1


def test_an_invalid_baseline_is_an_error(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "results.json"
    for text in ("{", json.dumps({"results": [{"case": "x"}]}), json.dumps([])):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"results\.json of a run of these benchmarks"):
            baseline.read(path)
    path.write_text(json.dumps({"results": [result("ours", 1.0)]}))
    assert len(baseline.read(path)) == 1


def test_geometric_means() -> None:
    results = [result("ours", 1.0), result("eager", 2.0), result("torch.compile", 3.0)]
    results += [result("ours", 1.0, case="glu (silu)"), result("eager", 8.0, case="glu (silu)")]
    blocks, everything = report.means(results)
    assert blocks == ["norm and activation", "float32", "1", "2.00x", "3.00x"]
    assert everything == ["all", "float32", "2", "4.00x", "3.00x"]


@pytest.mark.parametrize("bytes_per_sample", [1, 7, 100])
def test_the_largest_batch_fits_exactly(bytes_per_sample: int) -> None:
    run = Run("ours", nn.Identity(), nn.Identity(), {})
    run.peak = lambda batch, device: 50 + bytes_per_sample * batch
    for budget in (50, 50 + bytes_per_sample, 49 + 9 * bytes_per_sample, 50 + 9 * bytes_per_sample, 5000):
        expected = (budget - 50) // bytes_per_sample
        assert largest_batch(run, 8, budget, "cpu") == expected


def test_every_case_has_its_memory_traffic() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    for case in CASES:
        forward, backward = case.traffic
        # The forward reads all operands and writes a result; the backward pass reads the kept tensors and the gradient.
        tensors, kept = len(case.block.rows), set(case.block.rows) & set(case.block.kept)
        assert forward >= tensors + 1 and backward >= len(kept) + 2, case.name


def test_a_point_of_the_sweep_has_all_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in CASES if case.name == "rms_norm+silu")
    # Three rounds; a block of this size would take 200.
    monkeypatch.setattr(sweep, "measure", lambda *given: measure(*given[:-1], 3))
    found = sweep.point("by length", case, Setting((64, 64)), torch.float32, "cpu", compiled=False)
    assert (
        found["copy_ms"] > 0 and found["total_ms"].keys() == found["fraction_of_copy"].keys() == found["spread"].keys()
    )
    assert "eager" in found["total_ms"]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 64), nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


def stack(layers: int, tokens: int) -> plan.Case:
    model = nn.Sequential(*(Layer() for _ in range(layers)))
    return plan.Case(model, (torch.randn(tokens, 8),), {}, list, None)


def test_layers_are_checkpointed_one_of_every_k() -> None:
    case = stack(5, 64)
    (x,) = case.inputs
    expected = torch.autograd.grad(case.model(x).square().sum(), list(case.model.parameters()))
    for k in (2, 3):
        model = plan._checkpoint_every(case, k)
        found = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        torch.testing.assert_close(found, expected)
        kept = [saved_bytes(layer, x.clone().requires_grad_()) == x.nbytes for layer in model]
        assert kept == [number % k == 0 for number in range(5)]
        assert model[1] is not case.model[1] and "forward" not in vars(case.model[0])


def test_a_plan_is_compared_with_levels_and_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plan.CASES, "stack", stack)
    options = argparse.Namespace(layers=4, tokens=512, budgets=[1e-6, 0.9], rounds=1, compile=False)
    rows = {row["provider"]: row for row in plan.run("stack", options)["rows"]}
    # The first budget fits no plan.
    assert list(rows) == ["eager", "eager again", *OF_MODELS, "checkpoint every 2", "checkpoint every 3", "plan 0.9"]
    assert rows["eager"]["peak"] == rows["eager"]["time"] == 1.0
    planned = rows["plan 0.9"]
    assert planned["peak"] / planned["budget"] == pytest.approx(planned["of_budget"])
    assert planned["budget"] == pytest.approx(0.9, rel=0.02) and planned["of_budget"] <= 1.01
    others = [row["time"] for name, row in rows.items() if name != "plan 0.9" and row["peak"] <= planned["budget"]]
    assert planned["best_other"] == min(others)
