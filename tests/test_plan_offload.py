"""Offload as a choice for layers: the optimum of exhaustive search, predictions, and plans."""

import itertools
import pathlib
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import ckpt_kernels
from ckpt_kernels import DoesNotFit, Plan, offload, plan
from ckpt_kernels.plan.bench import Bench
from ckpt_kernels.plan.chain import predicted
from ckpt_kernels.plan.costs import FIXED, Assignment, Checkpoint, Checkpointed, Cost, Stage, StageAt, stages_of
from ckpt_kernels.plan.measure import Measurements, measure_choices
from ckpt_kernels.plan.offloading import Solutions, is_offloaded
from ckpt_kernels.plan.stages import _undominated

from .planned_models import WIDTH, Layer, loss_of, made, peak, plan_of
from .simulated_steps import simulated

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def tensors_of_1_kib_are_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "LEAST", 1024)


def chain(rng: random.Random, layers: int) -> list[Stage]:
    """A chain of layers with random costs, some of them offloaded, and the code after the last layer."""
    stages: list[Stage] = []
    for index in range(layers):
        output = rng.randint(1, 20)
        costs = {}
        for level in ("output", "all"):
            kept = output + rng.randint(0, 60)
            costs[level] = Cost(kept, kept + rng.randint(0, 30), rng.randint(0, 60), rng.random(), rng.random())
            own, moved = rng.randint(0, 60), rng.randint(1, 60)
            costs[f"{level}, offload"] = Cost(
                rng.randint(0, 5), kept, own + moved, rng.random(), rng.random(), may_be_inside=False, offloaded=moved
            )
        checkpointed = Checkpointed(rng.randint(0, 2), output + rng.randint(0, 30), rng.random(), rng.random() / 10)
        stages.append(Stage(f"s{index}", "S", output, rng.randint(-20, 20), costs, checkpointed, index > 0, index))
    last = Cost(rng.randint(0, 9), rng.randint(0, 99), rng.randint(0, 99), 0.1, 0.1)
    return [*stages, Stage("after", "", 1, rng.randint(-5, 5), {FIXED: last}, alike=layers)]


def assignments(stages: list[Stage]) -> list[Assignment]:
    """All assignments without checkpoints, and with one over one or two layers."""
    layers = range(len(stages) - 1)
    after = StageAt(len(stages) - 1, FIXED)
    may_repeat = stages[0].checkpointed is not None
    found: list[Assignment] = []
    for levels in itertools.product(*(stages[index].costs for index in layers)):
        parts = tuple(itertools.starmap(StageAt, enumerate(levels)))
        found.append((*parts, after))
        for first, count in itertools.product(layers, (1, 2) if may_repeat else ()):
            inside = parts[first : first + count]
            if len(inside) == count and not any(is_offloaded(part.level) for part in inside):
                found.append((*parts[:first], Checkpoint(inside), *parts[first + count :], after))
    return found


@pytest.mark.parametrize("seed", range(20))
def test_the_optimum_of_small_chains(seed: int) -> None:
    rng = random.Random(seed)
    stages = chain(rng, rng.randint(1, 3))
    if seed % 2:
        stages = [replace(stage, checkpointed=None) for stage in stages]
    tried = [predicted(stages, found) for found in assignments(stages)]
    solutions = Solutions(stages)
    for memory in {0, 10**6, *(need for need, _ in tried)}:
        best = min((seconds for need, seconds in tried if need <= memory), default=float("inf"))
        found = solutions.best(memory)
        if found is None:
            assert best == float("inf")
            continue
        need, seconds = predicted(stages, found)
        assert need <= memory
        assert seconds == pytest.approx(solutions.front.at(memory))
        # Checkpoints over three layers, and several in one chain, were not tried.
        assert seconds <= best + 1e-9
        assert any(isinstance(part, Checkpoint) for part in found) or seconds == pytest.approx(best)


def test_predictions_are_no_less_than_the_simulated_peak() -> None:
    rng = random.Random(0)
    for _ in range(50):
        stages = chain(rng, rng.randint(1, 4))
        for parts in rng.sample(assignments(stages), 4):
            need, seconds = predicted(stages, parts)
            real, real_seconds = simulated(stages, parts)
            moved = [stages[at.stage].costs[at.level].offloaded for at in stages_of(parts)]
            assert real <= need <= real + max(moved)
            assert seconds == pytest.approx(real_seconds)


def test_alike_layers_are_predicted_exactly() -> None:
    """If all layers are offloaded, the last layer's pass has the largest peak: its tensors and prefetched ones."""
    cost = Cost(0, 15, 11 + 8, 1.0, 2.0, may_be_inside=False, offloaded=11)
    layer = Stage("layer", "Layer", 1, 0, {"output, offload": cost})
    stages = [*(replace(layer, name=f"layer {index}") for index in range(4))]
    stages.append(Stage("after", "", 0, 2, {FIXED: Cost(1, 3, 4, 0.1, 0.1)}, alike=1))
    parts = (*(StageAt(index, "output, offload") for index in range(4)), StageAt(4, FIXED))
    assert predicted(stages, parts)[0] == simulated(stages, parts)[0] == 2 + 11 + 8 + 11


@pytest.fixture(scope="module")
def measured() -> tuple[nn.Module, Bench, Measurements]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offload, "LEAST", 1024)
        model, tokens = made()
        bench = Bench(model, (tokens,), {}, loss_of, lambda line: None)
        return model, bench, measure_choices(bench, (), offload=True)


def test_costs_predict_peaks(measured: tuple[nn.Module, Bench, Measurements]) -> None:
    """For random assignments. The reserve counts for layers in whose pass nothing is prefetched, too."""
    model, bench, found = measured
    slack = 0.03 * found.steps["eager"].peak
    rng = random.Random(0)
    for turn in range(8):
        levels = [
            rng.choice([level for level in stage.costs if turn % 2 == 0 or is_offloaded(level) or level == FIXED])
            for stage in found.stages
        ]
        parts = tuple(itertools.starmap(StageAt, enumerate(levels)))
        need, _ = predicted(found.stages, parts)
        real = bench.peak(f"{turn}", bench.twin(plan_of(model, found, parts)))
        moved = [stage.costs[level].offloaded for stage, level in zip(found.stages, levels, strict=True)]
        assert real - slack <= need <= real + max(moved) + slack, levels


def test_all_layers_may_be_offloaded(measured: tuple[nn.Module, Bench, Measurements]) -> None:
    _, _, found = measured
    assert all(any(map(is_offloaded, stage.costs)) for stage in found.stages if stage.kind)
    assert any("simulated" in note for note in found.notes)


class Counting(Layer):
    """A layer that writes to an attribute, and so is in no checkpoint."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def test_plans_with_offload_fit_where_others_do_not(tmp_path: pathlib.Path) -> None:
    model, tokens = made()
    model.layers = nn.ModuleList(Counting() for _ in range(6))

    def gradients() -> list[Tensor]:
        model.zero_grad()
        loss_of(model(tokens)).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients()
    with pytest.raises(DoesNotFit) as error:
        plan(model, tokens, budget=1024, loss=loss_of)
    budget = int(0.95 * error.value.least)
    found = plan(model, tokens, budget=budget, loss=loss_of, offload=True)
    assert any(is_offloaded(level) for level in found.levels.values())
    assert "offload" in str(found) and "in host memory" in str(found) and "simulated" in found.note
    found.draw(tmp_path / "plan.png")
    found.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again.assignment == found.assignment and again.stages == found.stages
    with pytest.warns(UserWarning, match="simulated"):
        again.apply(model)
    assert peak(model, tokens, loss=loss_of) <= budget
    torch.testing.assert_close(gradients(), expected, rtol=1e-4, atol=1e-5)
    ckpt_kernels.revert(model)


def test_choices_that_move_less_stay() -> None:
    """The reserve depends on the bytes moved."""
    more = Cost(5, 20, 60, 1.0, 1.0, may_be_inside=False, offloaded=50)
    less = replace(more, backward_peak=61, offloaded=10)
    assert _undominated({"output, offload": more, "all, offload": less}).keys() == {"output, offload", "all, offload"}
    assert _undominated({"output, offload": more, "all, offload": replace(less, offloaded=50)}) == {
        "output, offload": more
    }


def test_many_amounts_are_rounded_up() -> None:
    rng = random.Random(0)
    stages = chain(rng, 12)
    assert len({cost.offloaded for stage in stages for cost in stage.costs.values()}) > 16
    solutions = Solutions(stages)
    for memory in (60, 150, 400, 10**6):
        found = solutions.best(memory)
        if found is not None:
            need, seconds = predicted(stages, found)
            assert need <= memory and seconds == pytest.approx(solutions.front.at(memory))


def test_offload_with_tiles() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(TiledLayer() for _ in range(3)))
    bench = Bench(model, (torch.randn(512, WIDTH),), {}, None, lambda line: None)
    found = measure_choices(bench, (2,), offload=True)
    assert "output, tiles=2, offload" in found.steps
    levels = {level for stage in found.stages for level in stage.costs if is_offloaded(level)}
    assert any("tiles" in level for level in levels)


class TiledLayer(nn.Module):
    """A layer whose MLP takes nearly all memory of a step."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 8 * WIDTH), nn.Linear(8 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def test_small_tensors_are_not_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "LEAST", 2**20)
    model, tokens = made(layers=2)
    found = plan(model, tokens, budget=None, loss=loss_of, tiles=(), offload=True)
    assert "no layer keeps a tensor of 1.00 MiB or more, so none is offloaded" in found.note


def test_the_argument() -> None:
    model, tokens = made(layers=1)
    with pytest.raises(TypeError, match="offload is 1; expected True or False"):
        plan(model, tokens, budget=None, loss=loss_of, offload=1)  # type: ignore[arg-type]
