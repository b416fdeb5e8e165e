"""The solver: the optimum of exhaustive search on random chains; fronts and bounds."""

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from ckpt_kernels.plan.chain import is_length, predicted
from ckpt_kernels.plan.costs import Assignment, Checkpoint, Checkpointed, Cost, Stage, StageAt, stages_of
from ckpt_kernels.plan.solve import Solver

from .simulated_steps import simulated


def chain(rng: random.Random, stages: int, choices: int, runs: bool) -> list[Stage]:
    """A chain of stages with random costs."""
    found: list[Stage] = []
    for index in range(stages):
        output = rng.randint(1, 20)
        costs = {}
        for choice in range(choices):
            kept = output + rng.randint(0, 60)
            costs[f"c{choice}"] = Cost(kept, kept + rng.randint(0, 30), rng.randint(0, 60), rng.random(), rng.random())
        may_repeat = runs and rng.random() < 0.9
        outside = rng.choice([*costs, None]) if choices > 1 else None
        costs = {name: replace(cost, may_be_inside=name != outside) for name, cost in costs.items()}
        checkpointed = Checkpointed(
            rng.randint(0, 2), output + rng.randint(0, 30), rng.random(), rng.random() / 10, rng.random()
        )
        follows = index > 0 and rng.random() < 0.8
        left = rng.randint(-20, 20)
        found.append(
            Stage(f"s{index}", "S", output, left, costs, checkpointed if may_repeat else None, follows, alike=index)
        )
    return found


def assignments(stages: list[Stage], first: int, last: int, nested: bool = False) -> Iterator[Assignment]:
    """All assignments, including nested checkpoints."""
    if first > last:
        yield ()
        return
    for level, cost in stages[first].costs.items():
        if nested and not cost.may_be_inside:
            continue
        for rest in assignments(stages, first + 1, last, nested):
            yield StageAt(first, level), *rest
    for end in range(first, last + 1):
        if stages[end].checkpointed is None or (end > first and not stages[end].follows):
            return
        if nested and end == last:
            continue
        for inside in assignments(stages, first, end, nested=True):
            for rest in assignments(stages, end + 1, last, nested):
                yield Checkpoint(inside), *rest


def compare(stages: list[Stage], tried: list[tuple[int, float]]) -> None:
    solver = Solver(stages)
    for memory in {0, 10**6, *(need for need, _ in tried)}:
        best = min((seconds for need, seconds in tried if need <= memory), default=float("inf"))
        assert solver.front.at(memory) == pytest.approx(best, abs=1e-9)
        found = solver.best(memory)
        if found is None:
            assert best == float("inf")
            continue
        need, seconds = simulated(stages, found)
        assert predicted(stages, found) == (need, pytest.approx(seconds, abs=1e-9))
        assert need <= memory
        assert seconds == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("seed", range(100))
def test_the_optimum_of_small_chains_with_runs(seed: int) -> None:
    rng = random.Random(seed)
    stages = chain(rng, rng.randint(1, 4), rng.randint(1, 2), runs=True)
    compare(stages, [simulated(stages, found) for found in assignments(stages, 0, len(stages) - 1)])


@pytest.mark.parametrize("seed", range(20))
def test_the_optimum_of_chains_of_ten(seed: int) -> None:
    """20 chains a test, with as many choices as an exhaustive search allows."""
    for part in range(20):
        rng = random.Random(1000 * seed + part)
        count = rng.randint(1, 10)
        choices = next(n for n in (5, 4, 3, 2) if n**count <= 1100 or n == 2)
        stages = chain(rng, count, choices, runs=False)
        levels = [list(stage.costs) for stage in stages]
        tried = [
            simulated(stages, tuple(StageAt(i, level) for i, level in enumerate(picked)))
            for picked in itertools.product(*levels)
        ]
        rng.shuffle(tried)
        compare_some(stages, tried)


def compare_some(stages: list[Stage], tried: list[tuple[int, float]]) -> None:
    solver = Solver(stages)
    for index, (memory, _) in enumerate(tried[:8]):
        best = min(seconds for need, seconds in tried if need <= memory)
        assert solver.front.at(memory) == pytest.approx(best, abs=1e-9)
        # To find an assignment takes longer than to find the seconds.
        if index > 1:
            continue
        found = solver.best(memory)
        assert found is not None
        assert simulated(stages, found)[0] <= memory
        assert simulated(stages, found)[1] == pytest.approx(best, abs=1e-9)


def alike(stages: int) -> list[Stage]:
    """Layers with the costs of a language model's, in units of the output."""
    costs = {
        "none": Cost(21, 22, 5, 1.0, 2.0),
        "output": Cost(11, 15, 10, 1.0, 2.05),
        "all": Cost(6, 15, 16, 1.0, 2.3),
        "layer": Cost(2, 12, 17, 1.0, 2.6),
    }
    stage = Stage("layer", "Layer", 1, 0, costs, Checkpointed(0, 11, 1.0, 0.1), follows=True)
    return [replace(stage, name=f"layer {index}", follows=index > 0) for index in range(stages)]


def test_fronts_are_strictly_monotonic() -> None:
    front = Solver(alike(12)).front
    needs, seconds = front.needs.tolist(), front.seconds.tolist()
    assert needs == sorted(set(needs))
    assert seconds == sorted(set(seconds), reverse=True)
    assert front.at(needs[0] - 1) == float("inf")
    assert front.at(needs[-1] + 1000) == seconds[-1]


def test_thinned_fronts_hold_valid_assignments_and_a_lower_bound() -> None:
    rng = random.Random(3)
    stages = chain(rng, 8, 4, runs=True)
    exact, thinned = Solver(stages, limit=10**9), Solver(stages, limit=16)
    bound = Solver(stages, limit=16, optimistic=True).front
    assert thinned.is_thinned
    assert not exact.is_thinned
    assert len(thinned.front.needs) <= 17 < len(exact.front.needs)
    for memory in exact.front.needs.tolist()[::7]:
        assert bound.at(memory) <= exact.front.at(memory) + 1e-9
        assert thinned.front.at(memory) >= exact.front.at(memory) - 1e-9
        found = thinned.best(memory)
        if found is not None:
            need, seconds = simulated(stages, found)
            assert need <= memory
            assert seconds <= thinned.front.at(memory) + 1e-9


def test_many_layers_need_sublinear_memory_and_less_time_than_sqrt_checkpointing() -> None:
    """The baseline is a checkpoint over each of sqrt(n) runs of sqrt(n) layers."""
    count, root = 144, 12
    stages = alike(count)
    rule = tuple(Checkpoint(tuple(StageAt(i + j, "none") for j in range(root))) for i in range(0, count, root))
    need, seconds = simulated(stages, rule)
    solver = Solver(stages)
    found = solver.best(need)
    assert found is not None
    assert simulated(stages, found)[0] <= need < 0.2 * simulated(stages, choice_everywhere(count, "none"))[0]
    assert simulated(stages, found)[1] < seconds
    least = solver.best(int(solver.front.needs[0]))
    assert least is not None
    assert simulated(stages, least)[0] < need / 2
    assert [choice.stage for choice in stages_of(least)] == list(range(count))


def test_lengths_of_checkpoints_beyond_thirty_two_are_two_to_a_doubling() -> None:
    assert [length for length in range(1, 260) if is_length(length)] == [*range(1, 33), 48, 64, 96, 128, 192, 256]


def choice_everywhere(count: int, level: str) -> Assignment:
    return tuple(StageAt(index, level) for index in range(count))


def test_stages_that_must_run_once_are_in_no_checkpoint() -> None:
    stages = [replace(stage, checkpointed=None if i == 2 else stage.checkpointed) for i, stage in enumerate(alike(5))]
    least = Solver(stages).best(int(Solver(stages).front.needs[0]))
    assert least is not None
    assert any(isinstance(part, Checkpoint) for part in least)
    assert all(choice.stage != 2 for part in least if isinstance(part, Checkpoint) for choice in stages_of((part,)))
    with pytest.raises(ValueError, match="may run twice"):
        predicted(stages, (Checkpoint(choice_everywhere(5, "none")),))


def test_choices_that_may_not_be_inside_are_in_no_checkpoint() -> None:
    stages = [
        replace(s, costs={name: replace(cost, may_be_inside=name == "layer") for name, cost in s.costs.items()})
        for s in alike(9)
    ]
    least = Solver(stages).best(int(Solver(stages).front.needs[0]))
    assert least is not None
    runs = [part for part in least if isinstance(part, Checkpoint)]
    assert runs and {choice.level for choice in stages_of(tuple(runs))} == {"layer"}
    with pytest.raises(ValueError, match="'none' in a checkpoint; expected one of layer"):
        predicted(stages, (Checkpoint(choice_everywhere(9, "none")),))


def test_the_output_of_the_stage_before_is_there_in_the_first_pass_of_a_checkpoint() -> None:
    costs = {"none": Cost(1, 1, 1, 1.0, 1.0)}
    stages = [Stage(f"s{i}", "S", 50, 0, costs, Checkpointed(0, 60, 1.0, 0.0), i > 0, i) for i in range(2)]
    parts = (Checkpoint((StageAt(0, "none"), StageAt(1, "none"))),)
    assert predicted(stages, parts)[0] == simulated(stages, parts)[0] == 50 + 60


def test_a_step_that_frees_more_than_it_takes_has_no_negative_peak() -> None:
    stages = [Stage("s", "S", 0, -9, {"none": Cost(-9, -9, -9, 1.0, 1.0)}, None, False, 0)]
    assert predicted(stages, (StageAt(0, "none"),)) == (0, 2.0)
