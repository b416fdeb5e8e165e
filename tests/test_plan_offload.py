"""Offload as a choice for layers: the optimum of exhaustive search, predictions, and plans."""

import itertools
import pathlib
import random
import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckpt_kernels
from ckpt_kernels import DoesNotFit, Plan, offload, plan
from ckpt_kernels.levels import OF_MODULES, Policy
from ckpt_kernels.plan import offloading, report
from ckpt_kernels.plan import stages as stages_module
from ckpt_kernels.plan.bench import Bench
from ckpt_kernels.plan.chain import predicted
from ckpt_kernels.plan.costs import FIXED, Assignment, Checkpoint, Checkpointed, Cost, Stage, StageAt, stages_of
from ckpt_kernels.plan.marks import Position, Segment
from ckpt_kernels.plan.measure import Measurements, measure_choices
from ckpt_kernels.plan.offloading import Solutions, is_offloaded, offloaded_cost
from ckpt_kernels.plan.search import _bound
from ckpt_kernels.plan.stages import Stages, _undominated
from ckpt_kernels.plan.trials import Trials

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


@pytest.mark.parametrize("seed", range(6))
def test_the_optimum_of_alike_layers(seed: int) -> None:
    """The layers share their number, and so their fronts within checkpoints."""
    first, *_, after = chain(random.Random(seed), 1)
    layers = [replace(first, name=f"s{index}", follows=index > 0) for index in range(3)]
    stages = [*layers, after]
    solutions = Solutions(stages)
    tried = [predicted(stages, found) for found in assignments(stages)]
    for memory in {need for need, _ in tried}:
        found = solutions.best(memory)
        assert found is not None
        need, seconds = predicted(stages, found)
        assert need <= memory and seconds == pytest.approx(solutions.front.at(memory))
        assert seconds <= min(seconds for need, seconds in tried if need <= memory) + 1e-9


def test_a_thinned_front_says_so_and_has_a_lower_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = chain(random.Random(0), 2)
    exact, measurements = Solutions(stages), SimpleNamespace(stages=stages)
    monkeypatch.setattr(offloading, "_LIMIT", 2)
    thinned = Solutions(stages)
    assert thinned.is_thinned and not exact.is_thinned
    needs = exact.front.needs.tolist()
    assert any(thinned.front.at(need) > exact.front.at(need) for need in needs)
    assert all(_bound(measurements, thinned, need) <= exact.front.at(need) for need in needs)


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


def test_the_cost_of_a_layer_is_that_without_the_tensors_of_others() -> None:
    """In a step with all layers offloaded, each layer's pass finds its own tensors and prefetches those before."""
    moved, kept, inputs, scratch, gradients, gap = [10, 20, 40], [3, 0, 7], [5, 6, 0], [2, 9, 4], [1, 0, 8], 11
    memory: dict[Position, Segment] = {}
    for index in range(3):
        # The caller frees the layer's input after the layer. The code after the last layer takes more than elsewhere.
        memory["forward", index] = Segment(0.0, kept[index] + inputs[index], 99)
        memory["forward_gap", index + 1] = Segment(0.0, gap - inputs[index] + (1 if index == 2 else 0), 99)
        before = moved[index - 1] if index else 0
        fetched = moved[index] if index == 2 else 0
        freed = kept[index] + moved[index] - gradients[index]
        memory["backward", index] = Segment(0.0, before + fetched - freed, before + fetched + scratch[index])
    for index in range(3):
        expected = kept[index], moved[index] + scratch[index], gradients[index]
        assert offloaded_cost(memory, moved, gap, index) == expected
    # What the code after a layer frees beside the input is not the layer's.
    memory["forward_gap", 1] = Segment(0.0, gap - 50, 99)
    assert offloaded_cost(memory, moved, gap, 0)[0] == 0


def stages_of_steps(choices: dict[str, tuple[int, int, tuple[int, int]]]) -> list[Stage]:
    """The stages "b", the code behind, "a", and the code behind of a model whose layers are named "a" and "b".

    Of each choice: what a layer keeps, the net bytes of the code after a layer, and the bytes that "a" and "b" move.
    Each layer's backward pass takes 30 bytes beside tensors from host memory.
    """
    memory: dict[str, Any] = {}
    for choice, (kept, gap, (last, first)) in choices.items():
        memory[choice] = {
            **{(f"{way}_gap", index): Segment(0.1, 0, 0) for way in ("forward", "backward") for index in range(3)},
            **{("forward", index): Segment(1.0, kept, 95) for index in range(2)},
            ("backward", 1): Segment(2.0, first - kept, first + last + 30),
            ("backward", 0): Segment(2.0, -first - kept, 30),
        }
        memory[choice] |= {("forward_gap", index): Segment(0.1, gap, gap) for index in (1, 2)}
    recorders = {
        choice: SimpleNamespace(outputs={0: 7, 1: 7}, follows={0: False, 1: False}, offloaded=dict(enumerate(moved)))
        for choice, (_, _, moved) in choices.items()
    }
    trials: Any = SimpleNamespace(recorders=recorders, memory=memory, not_repeatable=(), not_repeatable_in_runs=())
    trials.layer_peaks = lambda choice, index: Trials.layer_peaks(trials, choice, index)
    seconds: Any = SimpleNamespace(of=lambda position, choice: memory[choice][position].seconds)
    model = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Tanh()})
    bench: Any = SimpleNamespace(names=["a", "b"], model=model, device=torch.device("cpu"))
    found, names = Stages(bench, ["b", "a"], trials, seconds).stages()
    assert names == ["b", "", "a", ""]
    return found


@pytest.fixture
def half_a_second_a_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages_module, "seconds_per_byte", lambda device: 0.5)


@pytest.mark.usefixtures("half_a_second_a_byte")
def test_the_costs_of_offloaded_layers() -> None:
    first, gap, last, after = stages_of_steps(
        {
            "none": (90, 4, (0, 0)),
            "output": (60, 6, (0, 0)),
            "all": (50, 5, (0, 0)),
            "output, offload": (8, 3, (40, 3)),
            "all, offload": (9, 3, (50, 0)),
            "layer, offload": (7, 9, (60, 0)),
        }
    )
    # The code after a layer frees 3 bytes more than at "output": those of the layer's input.
    assert first.costs["output, offload"] == Cost(5, 95, 33, 1.5, 2.0, may_be_inside=False, offloaded=3)
    assert last.costs["output, offload"] == Cost(5, 95, 70, 20.0, 20.0, may_be_inside=False, offloaded=40)
    # A level that keeps, and moves, more than another as fast is left out. So is one that moves nothing.
    assert [*first.costs] == ["all", "output, offload"] and [*last.costs] == ["all", "output, offload"]
    assert first.left == last.left == 0
    # For the code between, the choice of most bytes among those of converted layers without offload.
    assert gap.costs[FIXED].kept == after.costs[FIXED].kept == 6
    assert not any(stage.checkpointed for stage in (first, last))


@pytest.mark.usefixtures("half_a_second_a_byte")
def test_a_layer_leaves_what_it_leaves_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it leaves in a step with all layers offloaded counts only where no other step fits."""
    monkeypatch.setattr(stages_module, "offloaded_cost", lambda *given: (*offloaded_cost(*given)[:2], 99))
    on_host, on_device = {"output, offload": (8, 3, (40, 3))}, {"output": (60, 6, (0, 0))}
    assert [stages_of_steps(choices)[0].left for choices in (on_host, on_device | on_host)] == [99, 0]


@pytest.mark.usefixtures("half_a_second_a_byte")
def test_layers_may_fit_only_if_offloaded() -> None:
    """Where a step with all layers at any other choice but a checkpoint does not fit."""
    first, _, last, _ = stages_of_steps({"checkpoint": (10, 4, (0, 0)), "output, offload": (8, 3, (40, 3))})
    assert [*first.costs] == [*last.costs] == ["output, offload"]
    assert first.checkpointed is None and last.costs["output, offload"].kept == 7
    found = stages_of_steps({"output, offload": (8, 3, (40, 3))})
    first, _, last, _ = found
    assert [*first.costs] == [*last.costs] == ["output, offload"]
    assert last.costs["output, offload"].kept == 8
    assert Solutions(found).best(10**6) == tuple(
        StageAt(index, next(iter(stage.costs))) for index, stage in enumerate(found)
    )


@pytest.mark.parametrize("before", [0, 1])
def test_nothing_is_prefetched_in_the_pass_of_the_first_layer(before: int) -> None:
    """If that pass has the largest peak, the prediction is exact, with code before that layer and without."""
    code = Stage("code", "", 0, 0, {FIXED: Cost(0, 1, 1, 0.1, 0.1)})
    costs = [Cost(0, 15, own + 11, 1.0, 2.0, may_be_inside=False, offloaded=11) for own in (100, 8, 8)]
    layers = [Stage(f"layer {index}", "Layer", 1, 0, {"all, offload": cost}) for index, cost in enumerate(costs)]
    stages = [*[code] * before, *layers, Stage("after", "", 0, 2, {FIXED: Cost(1, 3, 4, 0.1, 0.1)})]
    parts = tuple(StageAt(index, *stage.costs) for index, stage in enumerate(stages))
    assert predicted(stages, parts)[0] == simulated(stages, parts)[0] == 2 + 100 + 11


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


def test_the_choices_that_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without offload none of them; with it, also offload in as many tiles as helped."""
    recorded: list[str] = []

    def record(trials: Trials, choice: str) -> bool:
        recorded.append(choice)
        trials.recorders[choice] = SimpleNamespace(shapes={0: (((2, 512, 8), ""),)}, outputs={0: 1})  # type: ignore
        peak = 100 // (Policy.of(choice, OF_MODULES, "choice").tiles or 1)
        trials.memory[choice] = {(way, 0): Segment(0.0, 0, peak) for way in ("forward", "backward")}
        trials.peaks[choice] = peak
        return True

    monkeypatch.setattr(Trials, "_record", record)
    bench: Any = SimpleNamespace(device=torch.device("cpu"))
    for tiles in ((), (2, 4)):
        recorded.clear()
        Trials(bench).run(tiles)
        assert recorded and not any(map(is_offloaded, recorded))
        recorded.clear()
        Trials(bench).run(tiles, offload=True)
        spelled = ["{}, offload", "{}, tiles=4, offload"] if tiles else ["{}, offload"]
        expected = [each.format(level) for each in spelled for level in ("output", "all", "layer")]
        assert [*filter(is_offloaded, recorded)] == expected


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
    with warnings.catch_warnings():
        # A note of the plan says that offload is simulated.
        warnings.simplefilter("error")
        found = plan(model, tokens, budget=budget, loss=loss_of, offload=True)
    assert any(is_offloaded(level) for level in found.levels.values())
    moved = sum(found.stages[at.stage].costs[at.level].offloaded for at in stages_of(found.assignment))
    assert "offload" in str(found) and f"in host memory  {report.size(moved)}" in str(found)
    assert "simulated" in found.note
    found.draw(tmp_path / "plan.png")
    found.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again.assignment == found.assignment and again.stages == found.stages
    with pytest.warns(UserWarning, match="simulated"):
        again.apply(model)
    assert peak(model, tokens, loss=loss_of) <= budget
    torch.testing.assert_close(gradients(), expected, rtol=1e-4, atol=1e-5)
    ckpt_kernels.revert(model)


@pytest.mark.parametrize(
    ("choice", "marker"),
    [("all", "o"), ("all, tiles=2", "s"), ("all, offload", "^"), ("all, tiles=2, offload", "^"), ("eager", "o")],
)
def test_the_markers_of_choices(choice: str, marker: str) -> None:
    assert report._marker(Policy.read(choice, OF_MODULES)) == marker


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
