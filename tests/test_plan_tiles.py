"""MLPs in tiles as choices for layers: notation, measurements, and plans."""

import pathlib
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckpt_kernels
from ckpt_kernels import DoesNotFit, Plan, plan
from ckpt_kernels.levels import OF_MODULES, Policy
from ckpt_kernels.memory import peak_bytes
from ckpt_kernels.plan.bench import Bench
from ckpt_kernels.plan.chain import predicted
from ckpt_kernels.plan.costs import FIXED, Assignment, Checkpoint, StageAt, stages_of
from ckpt_kernels.plan.measure import Measurements, measure_choices
from ckpt_kernels.plan.trials import Peaks

from .planned_models import plan_of

WIDTH, INNER, TOKENS = 16, 64, 1024
pytestmark = pytest.mark.usefixtures("one_thread")


class Layer(nn.Module):
    """A gated MLP, whose tensors of the inner width take nearly all memory of a step."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.gate, self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


class Mixer(nn.Module):
    """A layer without an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.one, self.two = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.one(self.norm(x)) * self.two(x)


class Stack(nn.Module):
    def __init__(self, *kinds: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind() for kind in kinds)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def made(*kinds: type[nn.Module]) -> tuple[Stack, Tensor]:
    torch.manual_seed(0)
    return Stack(*(kinds or (Layer, Layer, Layer))), torch.randn(TOKENS, WIDTH)


def peak(model: nn.Module, x: Tensor) -> int:
    """The peak in bytes of a step that accumulates into existing gradients."""

    def step() -> None:
        model(x).sum().backward()

    step()
    return peak_bytes(step)


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("level", ("output", "all", "layer", "checkpoint"))
def test_levels_with_tiles_lower_the_peak(level: str) -> None:
    model, x = made()
    expected = gradients(model, x)
    peaks = {}
    for spelled in (level, f"{level}, tiles=4"):
        report = ckpt_kernels.convert(model, recompute={"layers.*": spelled})
        assert report.recompute == f"by module: 3 x {spelled.replace('checkpoint', 'checkpointed output')}"
        torch.testing.assert_close(gradients(model, x), expected, rtol=1e-4, atol=1e-4)
        peaks[spelled] = peak(model, x)
    # Of three and more temporary tensors of the inner width only a quarter is alive, and the results of a tile.
    assert peaks[f"{level}, tiles=4"] <= peaks[level] - TOKENS * INNER * x.element_size()


def test_the_most_specific_number_of_tiles_applies() -> None:
    model, x = made()

    def of(recompute: Any, tiles: int = 1) -> int:
        ckpt_kernels.convert(model, recompute=recompute, tiles=tiles)
        return peak(model, x)

    one, four = of("all"), of("all", tiles=4)
    assert four < one
    # The number for the model, for the layers, and the default.
    assert of("all, tiles=4") == of("all, tiles=4", tiles=2) == of({"layers.*": "all"}, tiles=4) == four
    assert of({"layers.*": "all, tiles=1"}, tiles=4) == one
    assert of({"*": "all, tiles=1", "layers.*": "all, tiles=4"}) == four
    assert of({"layers.*": "all, tiles=4", "layers.?": "all"}) == one


@pytest.mark.parametrize(
    "spelled", ("none, tiles=2", "block, tiles=2", "all, tiles=0", "all, tiles=-1", "all, tile=2", "tiles=2", "", 3)
)
def test_levels_without_tiles_are_an_error(spelled: Any) -> None:
    model, _ = made()
    with pytest.raises(ValueError, match=r"recompute\['layers.0'\] is .*expected one of none, .*, or one of output, "):
        ckpt_kernels.convert(model, recompute={"layers.0": spelled})
    assert not any(map(ckpt_kernels.is_converted, model.modules()))


def test_levels_are_parsed_and_printed() -> None:
    for text in (*OF_MODULES, "all, tiles=4", "checkpoint, tiles=12"):
        assert str(Policy.of(text, OF_MODULES, "level")) == text
    assert Policy.read("checkpoint", OF_MODULES[:-1]) is None
    assert Policy.of("checkpoint, tiles=2", OF_MODULES, "level").inside() == Policy("output", 2)


@pytest.fixture(scope="module")
def trials() -> tuple[Stack, Bench, Measurements]:
    """Measurements of a model with one layer without an MLP."""
    model, x = made(Layer, Mixer, Layer, Layer)
    bench = Bench(model, (x,), {}, None, lambda line: None)
    return model, bench, measure_choices(bench, (2, 4))


def test_tiles_are_offered_if_they_lower_a_peak(trials: tuple[Stack, Bench, Measurements]) -> None:
    _, _, found = trials
    for name, stage in zip(found.layers, found.stages, strict=True):
        tiled = {level for level in stage.costs if "tiles" in level}
        assert bool(tiled) == (name not in ("", "layers.1")), name
        for level in tiled:
            fewer = stage.costs.get(level.replace("4", "2")) or stage.costs.get(level.partition(",")[0])
            if fewer is not None and fewer is not stage.costs[level]:
                mine = Peaks(stage.costs[level].forward_peak, stage.costs[level].backward_peak)
                assert mine.is_lower_than(Peaks(fewer.forward_peak, fewer.backward_peak))
        # In a checkpoint both forward passes have the largest number of tiles.
        inside = {level.partition(", ")[2] for level, cost in stage.costs.items() if cost.may_be_inside}
        if name:
            assert inside == {"tiles=4" if tiled else ""}


def test_costs_predict_peaks(trials: tuple[Stack, Bench, Measurements]) -> None:
    """For random assignments, with and without checkpoints.

    The first pass of a checkpoint is measured with its layers at "output", and takes less at levels with smaller peaks.
    """
    model, bench, found = trials
    slack = 0.01 * found.steps["eager"].peak
    rng = random.Random(0)
    tiles = set()
    for turn in range(5):
        parts = assignment(found, rng)
        tiles.update(choice.level for choice in stages_of(parts) if "tiles" in choice.level)
        need, _ = predicted(found.stages, parts)
        real = bench.peak(f"{turn}", bench.twin(plan_of(model, found, parts)))
        assert real <= need + slack, parts
        inside = stages_of(tuple(part for part in parts if isinstance(part, Checkpoint)))
        assert need <= real + slack or any(choice.level.startswith(("all", "layer")) for choice in inside), parts
    assert tiles


def assignment(found: Measurements, rng: random.Random) -> Assignment:
    parts: list[StageAt | Checkpoint] = []
    while (index := len(stages_of(tuple(parts)))) < len(found.stages):
        stage = found.stages[index]
        if FIXED in stage.costs:
            parts.append(StageAt(index, FIXED))
        elif rng.random() < 0.4:
            parts.append(StageAt(index, rng.choice(list(stage.costs))))
        else:
            ends = [end for end in range(index, len(found.stages)) if found.stages[end].checkpointed]
            run = range(index, rng.choice([end for end in ends if found.layers[end]]) + 1)
            levels = [[level for level, cost in found.stages[i].costs.items() if cost.may_be_inside] for i in run]
            parts.append(Checkpoint(tuple(StageAt(i, rng.choice(of)) for i, of in zip(run, levels, strict=True))))
    return tuple(parts)


def test_a_budget_that_only_tiles_fit(tmp_path: pathlib.Path) -> None:
    model, x = made()
    expected = gradients(model, x)
    with pytest.raises(DoesNotFit) as raised:
        plan(model, x, budget=0.25, tiles=())
    assert raised.value.least > 0.25 * peak(model, x)
    found = plan(model, x, budget=0.25, tiles=[4])
    assert found.measured.peak <= found.budget
    assert abs(found.predicted.peak - found.measured.peak) <= 0.01 * found.steps["eager"].peak
    assert any("tiles=4" in level for level in found.levels.values())
    assert "tiles=4" in str(found)
    found.save(tmp_path / "plan.json")
    read = Plan.load(tmp_path / "plan.json")
    assert read == found
    report = read.apply(model)
    assert "tiles=4" in report.recompute
    assert peak(model, x) <= found.budget
    torch.testing.assert_close(gradients(model, x), expected, rtol=1e-4, atol=1e-4)
    read.revert(model)
    assert not any(map(ckpt_kernels.is_converted, model.modules()))
    damaged = (tmp_path / "plan.json").read_text().replace("tiles=4", "tiles=none")
    (tmp_path / "plan.json").write_text(damaged)
    with pytest.raises(ValueError, match="holds no plan"):
        Plan.load(tmp_path / "plan.json")


def test_no_tiles_are_tried_for_few_tokens() -> None:
    model, x = made()
    lines: list[str] = []
    plan(model, x[:256], budget=None, progress=lines.append)
    assert not any("tiles" in line for line in lines)


@pytest.mark.parametrize("tiles", ([1], [2, 0], ["2"], [True]))
def test_invalid_numbers_of_tiles(tiles: Any) -> None:
    model, x = made()
    with pytest.raises(ValueError, match=r"tiles is .*; expected whole numbers above 1"):
        plan(model, x, budget=None, tiles=tiles)
