"""Plans for many layers: the pattern of timed steps, the cost of runs, and the square-root rule."""

import itertools
import math
import sys
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckpt_kernels
from benchmarks.chains import Block, Chain, by_the_rule, peak
from ckpt_kernels.plan.bench import LONE_CHECKPOINT, PLAIN_CHECKPOINT, ChoiceByLayer
from ckpt_kernels.plan.chain import predicted
from ckpt_kernels.plan.costs import Checkpoint, Checkpointed, Cost, Stage, StageAt
from ckpt_kernels.plan.marks import Segment
from ckpt_kernels.plan.stages import Stages, _undominated
from ckpt_kernels.plan.timing import LONGEST, MANY, Pattern, Seconds, _shared_in_runs, _typical, offers_one_more
from ckpt_kernels.runs import Place, Run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("kinds", "choices"),
    (([0] * 8, 7), ([0] * 8, 11), ([0] * 1000, 7), ([0, 1] * 30, 7), ([*[0] * 20, 1], 6), (list(range(5)), 6)),
)
def test_each_kind_of_layers_has_each_choice_often_enough(kinds: list[int], choices: int) -> None:
    pattern = Pattern(kinds, choices)
    times = Counter(
        (kind, choice)
        for step in range(pattern.steps)
        for kind, choice in zip(kinds, pattern.choices(step), strict=True)
    )
    sizes = Counter(kinds)
    for kind, size in sizes.items():
        enough = MANY if size >= MANY else 3 if len(sizes) * MANY > len(kinds) else 1
        assert all(times[kind, choice] >= enough for choice in range(choices))
    assert 2 <= pattern.steps <= (choices if len(sizes) * MANY <= len(kinds) else 3 * choices)


def test_the_choices_go_on_from_step_to_step() -> None:
    """Also where the last stretch is shorter than the others."""
    pattern = Pattern([0] * 45, 11)
    assert pattern.longest == 2
    first, second = pattern.choices(0), pattern.choices(1)
    assert (first[-2], first[-1], second[0], second[2]) == (10, 0, 1, 2)


def test_a_choice_that_is_better_within_a_checkpoint_alone_is_kept() -> None:
    costs = {"none": Cost(10, 10, 5, 1.0, 2.0, inside=0.5), "output": Cost(10, 10, 5, 1.25, 2.0)}
    assert _undominated(costs) == costs
    costs["all"] = Cost(10, 10, 5, 1.25, 2.0, inside=0.25)
    assert list(_undominated(costs)) == ["none", "output"]


def test_of_levels_with_equal_bytes_the_one_that_runs_less_again_stays() -> None:
    costs = {"all": Cost(10, 10, 5, 1.25, 2.0), "layer": Cost(10, 10, 5, 1.0, 2.0)}
    assert list(_undominated(costs)) == ["all"]
    assert list(_undominated({**costs, "layer": Cost(10, 10, 4, 1.5, 2.0)})) == ["all", "layer"]
    assert list(_undominated({"none": costs["all"], "block": costs["layer"]})) == ["block"]


def test_layers_that_are_alike_need_few_timed_steps_in_stretches() -> None:
    assert (Pattern([0] * 8, 7).steps, Pattern([0] * 8, 7).longest) == (4, 1)
    assert [Pattern([0] * layers, 7).steps for layers in (MANY - 1, MANY)] == [21, 7]
    # With tiles there are four choices more.
    assert (Pattern([0] * 8, 11).steps, Pattern([0] * 22, 11).steps) == (6, 2)
    many = Pattern([0] * 1000, 7)
    assert (many.steps, many.longest) == (2, LONGEST)
    lengths = [len(list(same)) for _, same in itertools.groupby(many.choices(0))]
    assert set(lengths[:-1]) == {LONGEST}


def test_a_stretch_of_checkpointed_layers_is_one_run() -> None:
    choices = dict(zip("abcdefg", ["all", *["checkpoint"] * 3, *[PLAIN_CHECKPOINT] * 2, "none"], strict=True))
    levels = ChoiceByLayer(choices, longest=2).levels_in(nn.Module())
    assert [levels[name][0] for name in "abcdefg"] == ["all", "output", "output", "output", "none", "none", "none"]
    runs = [[Place(0, 0, False), Place(0, 1, True)], [Place(1, 0, True)], [Place(2, 0, False), Place(2, 1, True)]]
    assert [levels[name][1] for name in "bcdef"] == [(place,) for run in runs for place in run]
    assert levels["a"][1] == levels["g"][1] == ()


def test_the_layers_of_a_run_share_its_passes() -> None:
    by_layer = ChoiceByLayer({"a": "checkpoint", "b": "checkpoint", "c": "none"}, longest=2)
    step = {(part, i): Segment(float(i + 1), i, i) for part in ("forward", "backward") for i in range(3)}
    shared = _shared_in_runs(step, by_layer, ["a", "b", "c"])
    assert [shared["backward", i].seconds for i in range(3)] == [1.5, 1.5, 3.0]
    assert [shared["forward", i].seconds for i in range(3)] == [1.5, 1.5, 3.0]
    assert [shared["backward", i].net for i in range(3)] == [0, 1, 2]


def test_disturbed_samples_are_left_out() -> None:
    assert _typical([1.0]) == 1.0
    assert _typical([1.0, 1.2, 50.0, 60.0]) == pytest.approx(1.1)
    assert _typical([*[1.0] * 30, *[2.0] * 30, *[90.0] * 20]) == pytest.approx(1.5)


def test_choices_cost_more_within_a_checkpoint() -> None:
    cost = {"none": Cost(10, 10, 5, 1.0, 2.0, inside=0.5), "output": Cost(5, 10, 5, 1.0, 2.0)}
    stage = Stage("s", "S", 1, 0, cost, Checkpointed(0, 10, 0.25, 0.0))
    seconds = [predicted([stage], (part,))[1] for level in cost for part in (StageAt(0, level), _alone(level))]
    assert seconds == [3.0, 3.75, 3.0, 3.25]


def _alone(level: str) -> Checkpoint:
    return Checkpoint((StageAt(0, level),))


class _Timed:
    """The seconds of a forward and a backward pass, by choice."""

    def __init__(self, **by_choice: tuple[float, float]) -> None:
        self.by_choice = {name.replace("_", " "): seconds for name, seconds in by_choice.items()}

    def of(self, position: tuple[str, int], choice: str) -> float:
        return self.by_choice[choice][position[0] == "backward"]

    def has(self, choice: str) -> bool:
        return choice in self.by_choice

    def of_run(self, index: int, choice: str) -> tuple[float, float]:
        return self.by_choice[choice]

    def begin(self, index: int) -> float:
        return 0.125


def _checkpointed(kept: int, **by_choice: tuple[float, float]) -> tuple[list[float], Checkpointed | None]:
    """The seconds that two choices add within a checkpoint that keeps so many bytes, and the cost of the first run."""
    costs = {"none": Cost(10, 10, 5, 1.0, 2.0), "output": Cost(8, 10, 5, 1.25, 2.25)}
    stages: Any = object.__new__(Stages)
    stages._seconds = _Timed(**by_choice)
    stages._cost = lambda choice, index: (Cost(kept, 9, 5, 1.0, 3.0), 0)
    found, first = Stages._checkpointed(stages, "checkpoint", 0, costs, 3)
    return [found[level].inside for level in costs], first


def test_the_cost_within_a_checkpoint() -> None:
    # The recipes take half a second when the layer runs again; without recipes the second run stops early.
    timed = {"checkpoint": (1.25, 4.0), "checkpoint_of_none": (1.0, 2.75)}
    assert _checkpointed(4, **timed) == ([0.0, 0.75], Checkpointed(1, 9, 1.0, 0.0, 0.125))
    assert _checkpointed(2, **timed) == ([0.0, 0.75], Checkpointed(0, 9, 1.0, 0.0, 0.125))
    # Without times of the plain checkpoint all choices add what recipes add.
    assert _checkpointed(4, checkpoint=timed["checkpoint"]) == ([0.0, 0.25], Checkpointed(1, 9, 1.5, 0.0, 0.125))
    # A checkpoint that keeps no less is no choice.
    assert _checkpointed(8, **timed) == ([0.0, 0.0], None)
    # A first run much faster than an ordinary one is noise; the second run stops at half of the pass at the earliest.
    fast = {"checkpoint": (0.25, 1.0), "checkpoint_of_none": (0.5, 1.0)}
    (none, output), first = _checkpointed(4, **fast)
    assert none == 0.0 and output == pytest.approx(0.225)
    assert first is not None and (first.forward, first.saved) == (pytest.approx(0.9), 0.5)


def test_a_checkpoint_adds_seconds_once() -> None:
    costs = {"none": Cost(10, 10, 5, 1.0, 2.0)}
    one = Stage("s", "S", 1, 0, costs, Checkpointed(0, 10, 0.5, 0.0, begin=0.25), follows=True)
    last = replace(one, checkpointed=Checkpointed(0, 10, 0.5, 0.0, begin=4.0))
    inside = StageAt(0, "none"), StageAt(1, "none")
    apart = Checkpoint(inside[:1]), Checkpoint(inside[1:])
    assert [predicted([one, last], parts)[1] for parts in ((Checkpoint(inside),), apart)] == [7.25, 11.25]


def test_the_seconds_that_a_checkpoint_adds_once_are_those_of_short_runs_beyond_long_ones() -> None:
    by_group = {
        ("forward", 0, LONE_CHECKPOINT): 1.5,
        ("backward", 0, LONE_CHECKPOINT): 4.0,
        ("forward", 0, PLAIN_CHECKPOINT): 1.25,
        ("backward", 0, PLAIN_CHECKPOINT): 3.5,
        ("forward", 0, "checkpoint"): 1.0,
        ("backward", 0, "checkpoint"): 5.0,
    }
    seconds = Seconds(by_group, [0])
    seconds.begins = {(0, LONE_CHECKPOINT): 1.0, (0, PLAIN_CHECKPOINT): 0.25, (0, "checkpoint"): 0.5}
    assert seconds.begin(0) == 1.0
    assert seconds.of_run(0, PLAIN_CHECKPOINT) == (1.25, 3.25)
    assert seconds.of_run(0, "checkpoint") == (1.0, 4.5)
    # Less than nothing is noise.
    by_group["backward", 0, LONE_CHECKPOINT] = 3.0
    assert seconds.begin(0) == 0.0
    without = Seconds({group: value for group, value in by_group.items() if group[2] != LONE_CHECKPOINT}, [0])
    without.begins = {(0, PLAIN_CHECKPOINT): 1.0}
    assert (without.begin(0), without.of_run(0, PLAIN_CHECKPOINT)) == (0.0, (1.25, 3.5))


def test_checkpoints_of_one_layer_are_timed_if_they_take_no_more_steps() -> None:
    assert [offers_one_more([0] * layers, 7) for layers in (8, 100, 128, 1000)] == [False, False, True, True]
    choices = dict(zip("abcd", [*[LONE_CHECKPOINT] * 2, *[PLAIN_CHECKPOINT] * 2], strict=True))
    assert list(ChoiceByLayer(choices, longest=2).runs()) == [["a"], ["b"], ["c", "d"]]
    levels = ChoiceByLayer(choices, longest=2).levels_in(nn.Module())
    assert [levels[name] for name in "ab"] == [("none", (Place(key, 0, True),)) for key in (0, 1)]


def test_plans_know_the_seconds_that_a_checkpoint_adds_once(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = 1e-3

    class SlowRun(Run):
        def __init__(self, key: int, depth: int = 0) -> None:
            end = time.process_time() + begun
            while time.process_time() < end:
                pass
            super().__init__(key, depth)

    monkeypatch.setattr("ckpt_kernels.runs.Run", SlowRun)
    # With shorter stretches few layers are enough.
    monkeypatch.setattr(sys.modules[Pattern.__module__], "_LEAST_RUN", 2)
    chain, x = Chain(32, 16), torch.randn(32, 16, requires_grad=True)
    lines: list[str] = []
    plan = ckpt_kernels.plan(chain, x, budget=peak(by_the_rule(chain), x), progress=lines.append)
    begins = {stage.checkpointed.begin for stage in plan.stages if stage.checkpointed is not None}
    assert len(begins) == 1
    # Other work on the machine adds to the measured time.
    assert 0.5 * begun < begins.pop() < 3 * begun
    assert sum(line.startswith("times") for line in lines) == Pattern([0] * 32, 7).steps == 2


def test_a_plan_at_the_peak_of_the_square_root_rule_runs_no_layer_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: Counter[Block] = Counter()
    forward = Block.forward

    def counting(self: Block, x: Tensor) -> Tensor:
        runs[self] += 1
        return forward(self, x)

    torch.manual_seed(0)
    chain, x = Chain(16, 16), torch.randn(32, 16, requires_grad=True)
    rule = by_the_rule(chain)
    assert rule.stretch == math.isqrt(16)
    budget = peak(rule, x)
    lines: list[str] = []
    plan = ckpt_kernels.plan(chain, x, budget=budget, progress=lines.append)
    # Memory at six choices, what runs twice, times, the plan's memory, the plan and a rival twice, and eager once.
    assert plan.count == len(lines) <= 6 + 1 + Pattern([0] * 16, 7).steps + 1 + 2 * 2 + 1 == 15
    plan.apply()
    assert peak(chain, x) <= budget
    runs.clear()
    monkeypatch.setattr(Block, "forward", counting)
    chain(x).sum().backward()
    by_plan = [runs[layer] for layer in chain.layers]
    runs.clear()
    rule(x).sum().backward()
    assert [runs[layer] for layer in rule.layers] == [2] * 16
    assert max(by_plan) <= 2 and sum(by_plan) < 2 * 16
