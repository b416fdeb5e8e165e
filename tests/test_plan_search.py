"""The search for a plan, with steps of given peaks and seconds: candidates, the result, and errors."""

import random
import sys
from dataclasses import replace
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from ckpt_kernels import DoesNotFit, Plan, memory, plan
from ckpt_kernels.plan.bench import Bench, StepCost
from ckpt_kernels.plan.budget import bytes_of
from ckpt_kernels.plan.costs import FIXED, Checkpoint, Cost, Stage, StageAt
from ckpt_kernels.plan.fronts import Front
from ckpt_kernels.plan.marks import peak_of
from ckpt_kernels.plan.measure import Measurements, measure_choices
from ckpt_kernels.plan.plan import structure_of
from ckpt_kernels.plan.search import _best, _candidates, _Plans, budget_bytes, fastest, one_level
from ckpt_kernels.plan.solve import Solver
from ckpt_kernels.runs import Place, is_repeating

from .planned_models import Layer, loss_of, made
from .simulated_steps import simulated
from .test_plan_solve import alike, assignments, chain, choice_everywhere, compare


@pytest.mark.parametrize("seed", range(20))
def test_equal_stages_share_fronts(seed: int) -> None:
    rng = random.Random(seed)
    kinds = chain(rng, 2, 1, runs=True)
    picked = [rng.randrange(2) for _ in range(5)]
    stages = [
        replace(kinds[kind], name=f"{index}", alike=kind, follows=index > 0 and rng.random() < 0.6)
        for index, kind in enumerate(picked)
    ]
    compare(stages, [simulated(stages, found) for found in assignments(stages, 0, len(stages) - 1)])


def test_thinned_fronts_keep_the_leanest_assignment() -> None:
    for seed in range(6):
        stages = chain(random.Random(seed), 7, 4, runs=True)
        exact, thinned = Solver(stages, limit=10**9), Solver(stages, limit=8)
        assert thinned.is_thinned
        assert int(thinned.front.needs[0]) == int(exact.front.needs[0])


class Searching:
    """A search with steps whose peaks are the given ones, one after the other, and whose seconds are given by name.
    Other peaks and seconds are as predicted."""

    count = 0
    input_shape = (2, 3)

    def __init__(self, peaks: list[int], seconds: dict[str, float] | None = None, eager: int | None = None) -> None:
        self.predicted: list[int] = []
        self.timed: list[str] = []
        self._given = iter(peaks)
        self._seconds = seconds or {}
        self._eager = eager

    def twin(self, made: Plan | None) -> Plan | None:
        return made

    def peak(self, what: str, made: Plan) -> int:
        self.predicted.append(made.predicted.peak)
        return next(self._given, made.predicted.peak)

    def seconds(self, what: str, made: Plan | None) -> float:
        name = what.removeprefix("time of ").partition(",")[0]
        self.timed.append(name)
        return self._seconds.get(name, made.predicted.seconds if made else 0.0)

    def found(self, budget: int) -> Plan:
        stages = alike(6)
        levels = {level: StepCost(*simulated(stages, choice_everywhere(6, level))) for level in stages[0].costs}
        none = levels.pop("none")
        measurements = Measurements(
            stages=stages,
            layers=[stage.name for stage in stages],
            steps=levels | ({"eager": StepCost(self._eager, none.seconds)} if self._eager else {}),
            shapes={},
            notes=[],
        )
        return fastest(nn.Linear(2, 2), cast(Bench, self), measurements, budget)


def test_a_plan_measured_above_the_budget_is_replanned_for_less() -> None:
    search = Searching([70, 65, 60])
    found = search.found(60)
    first, second, *_ = search.predicted
    assert first <= 60
    assert second <= 60 - (70 - first)
    assert found.measured.peak <= 60
    assert "too few at first" in found.note
    assert "too few" not in Searching([]).found(60).note


def test_a_level_that_fits_is_chosen_where_all_plans_are_above_the_budget() -> None:
    assert Searching([70] * 20).found(60).measured.peak == 52


def test_the_least_peak_is_the_smallest_that_was_measured() -> None:
    for peaks, least in (([70] * 20, 29), ([70, 24, *[70] * 20], 24)):
        with pytest.raises(DoesNotFit, match=f"at least {least}") as raised:
            Searching(peaks).found(20)
        assert raised.value.least == least


def test_other_plans_are_tried_where_predictions_differ_in_error() -> None:
    """The error of one plan leaves no memory for any other by prediction."""
    search = Searching([70, 200, 60])
    assert search.found(60).measured.peak <= 60
    assert len(set(search.predicted)) == len(search.predicted) == 3


def test_eager_is_chosen_if_it_fits_and_is_faster() -> None:
    assert Searching([], {"eager": 0.0}, eager=130).found(60).whole is None
    assert Searching([], {"eager": 1e9}, eager=130).found(200).whole is None
    found = Searching([], {"eager": 0.0}, eager=130).found(200)
    assert found.whole == "none" and found.bound == found.predicted.seconds == 0.0
    assert Searching([], {"eager": 0.0}, eager=130).found(130).whole == "none"


@pytest.mark.parametrize(("budget", "seconds", "turns"), ((60, 3.0, 1), (200, 3.0, 2), (200, 1e9, 1)))
def test_a_second_turn_is_timed_only_if_a_rival_that_fits_was_faster(budget: int, seconds: float, turns: int) -> None:
    search = Searching([], {"eager": seconds}, eager=130)
    found = search.found(budget)
    assert search.timed.count("eager") == search.timed.count("the plan") == turns
    assert len(set(search.timed)) == len(search.timed) - 2 * (turns - 1)
    assert found.steps["eager"].seconds == seconds


def test_only_rivals_that_were_faster_have_a_second_turn() -> None:
    search = Searching([], {"all layers at 'all'": 0.5, "eager": 1e9}, eager=50)
    search.found(60)
    assert sorted(search.timed) == ["all layers at 'all'"] * 2 + ["eager"] + ["the plan"] * 2


def test_the_leanest_of_equally_fast_plans_is_chosen() -> None:
    faster, leaner, slower = (Cost(kept, kept, 0, 1.0, after) for kept, after in ((90, 1.0), (50, 1.002), (10, 1.1)))
    stage = Stage("s", "S", 1, 0, {"none": faster, "output": leaner, "all": slower}, None, False, alike=0)
    for budget in (None, 100):
        assert _best(Solver([stage]), budget) == (StageAt(0, "output"),)


def test_errors_of_steps_are_raised_and_a_fraction_needs_a_peak() -> None:
    class Failing(Searching):
        device = torch.device("cpu")

        def peak(self, what: str, made: Plan) -> int:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        one_level(nn.Linear(2, 2), cast(Bench, Failing([])), None, "")
    with pytest.raises(ValueError, match=r"budget is 0\.5, of eager's peak, and a step of eager does not fit"):
        budget_bytes(0.5, {}, torch.device("cpu"))


def test_one_level_for_all_layers_is_chosen_if_it_fits_and_is_faster() -> None:
    """The budget is 60 bytes; "all" takes 46 and "output" 76."""
    search = Searching([], {"all layers at 'all'": 0.5})
    found = search.found(60)
    assert set(search.timed) == {"the plan", "all layers at 'all'"}
    assert found.assignment == choice_everywhere(6, "all")
    assert found.measured == StepCost(simulated(alike(6), found.assignment)[0], 0.5)
    assert "faster than the plan" in found.note
    assert Searching([], {"all layers at 'all'": 1e9}).found(60).assignment != found.assignment


def test_all_layers_in_checkpoints_of_their_own() -> None:
    """The code after the layers is in none. The peak is that of the step."""
    after = Stage("after", "", 0, 0, {FIXED: Cost(1, 3, 4, 0.1, 0.1)})
    steps = {"checkpoint": StepCost(1234, 5.0)}
    measurements = Measurements([*alike(2), after], ["a", "b", ""], steps, {}, [])
    found = _Plans(nn.Linear(2, 2), (2, 3), measurements, None, 0.0, []).at_one("checkpoint")
    layers = (Checkpoint((StageAt(index, "output"),)) for index in range(2))
    assert found is not None and found.assignment == (*layers, StageAt(2, FIXED))
    assert found.measured.peak == 1234


def test_a_level_that_was_slower_once_is_not_chosen() -> None:
    class Noisy(Searching):
        def seconds(self, what: str, made: Plan | None) -> float:
            seconds = super().seconds(what, made)
            return 1e9 if "2 of 2" in what and "all layers" in what else seconds

    search = Noisy([], {"all layers at 'all'": 0.5})
    assert search.found(60).assignment != choice_everywhere(6, "all")
    assert search.timed.count("all layers at 'all'") == 2


class OneLevel(Searching):
    """Steps at one level for the whole model, by peaks; later levels are slower."""

    device = torch.device("cpu")

    def peak(self, what: str, made: Plan) -> int:
        return next(self._given)

    def seconds(self, what: str, made: Plan | None) -> float:
        self.timed.append(what)
        return float(len(self.timed))


def test_one_level_for_the_whole_model() -> None:
    """The fastest that fits: eager, "block", "output", "all" and "layer", in this order."""
    model = nn.Linear(2, 2)
    for budget, whole in ((90, "none"), (80, "block"), (60, "output"), (50, "all"), (40, "layer")):
        found = one_level(model, cast(Bench, OneLevel([90, 80, 60, 50, 40])), budget, "no layers")
        assert (found.whole, found.measured.peak, found.note) == (whole, budget, "no layers")
    with pytest.raises(DoesNotFit, match="at least 30"):
        one_level(model, cast(Bench, OneLevel([90, 80, 30, 50, 40])), 20, "")


def test_places_of_layers_in_runs() -> None:
    model, _ = made()
    nothing = StepCost(0, 0.0)
    runs = (StageAt(0, "none"), Checkpoint((StageAt(1, "all"), Checkpoint((StageAt(2, "none"), StageAt(3, "none"))))))
    names = [f"layers.{i}" for i in range(4)]
    found = Plan(None, runs, nothing, nothing, {}, 0.0, [], [], names, structure_of(model), {}).levels_in(model)
    assert found == {
        "layers.0": ("none", ()),
        "layers.1": ("all", (Place(1, 0, False),)),
        "layers.2": ("none", (Place(1, 1, False), Place(2, 0, False))),
        "layers.3": ("none", (Place(1, 2, True), Place(2, 1, True))),
    }


def test_layers_that_differ_when_recomputed_are_offered_no_checkpoint() -> None:
    class Fickle(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * (1.0 + 0.1 * is_repeating()))

    model, tokens = made()
    model.layers[1] = Fickle()
    found = measure_choices(Bench(model, (tokens,), {}, loss_of, lambda line: None))
    offered = [stage.checkpointed is not None for name, stage in zip(found.layers, found.stages, strict=True) if name]
    assert offered == [True, False, True, True]
    # In a checkpoint of several layers, the layers after this one would get another input.
    follows = [stage.follows for name, stage in zip(found.layers, found.stages, strict=True) if name]
    assert follows == [False, False, False, False]


def test_peaks_of_steps_exclude_gradients() -> None:
    model, tokens = made()
    bench = Bench(model, (tokens,), {}, loss_of, lambda line: None)
    _, points = bench.step("", bench.twin(None), memory=True)

    def step() -> None:
        output = model(tokens)
        loss = loss_of(output)
        loss.backward()

    step()
    assert peak_of(points) == pytest.approx(memory.peak_bytes(step), rel=0.01)


def test_a_failed_step_ends_the_recording() -> None:
    model, tokens = made()

    def failing(output: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        plan(model, tokens, budget=None, loss=failing)
    assert sys.modules["ckpt_kernels.plan.marks"]._recorder is None


def test_the_budget_device_is_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 900)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300)
    assert bytes_of("device", 1, torch.device("cuda", 0)) == 1520


class Line:
    """A solver whose assignments are the bytes that they need: 0 to 20, each faster than the one before."""

    front = Front(torch.arange(21), 30.0 - torch.arange(21))

    def best(self, budget: int) -> int:
        return budget


def test_the_order_of_candidates() -> None:
    errors = [0]
    tried = _candidates(cast(Solver, Line()), 12, errors)
    first = [next(tried)]
    for error in (4, 2):  # the largest error so far counts
        errors.append(error)
        first.append(next(tried))
    assert first == [12, 8, 8]
    # From the fastest that should fit to the leanest.
    assert list(tried) == [12, 10, 7, 5, 2, 0]
    errors[:] = [100]
    assert list(_candidates(cast(Solver, Line()), 2, errors)) == [5, 4, 3, 2, 1, 0]
