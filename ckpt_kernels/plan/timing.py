"""Measures the seconds of each choice for each layer, in steps in which the layers have different choices.

Of many layers, stretches of adjacent layers have the same choice, as in a plan: the first layers of a stretch are
slower, because their code is in no cache of the processor yet. A stretch of checkpointed layers is one checkpoint.
"""

import itertools
import math
import statistics

from torch import nn

from .bench import LONE_CHECKPOINT, PLAIN_CHECKPOINT, Bench, ChoiceByLayer
from .marks import NotAChain, Position, Segment, segments

# Each kind of layers has each choice at least this many times, if each kind has at least this many layers on average.
# With fewer layers there are three rounds of steps, and each layer has each choice three times.
MANY = 4
# The most layers in a stretch. A machine that is slow for a while should slow down more than one stretch.
LONGEST = 32
# Checkpoints of one layer are timed if other checkpoints span at least this many.
_LEAST_RUN = 8
# With fewer samples of a group, two or three disturbed ones would be a quarter of all.
FEW = 16


class Pattern:
    """Which layer has which choice in which step.

    Args:
        kinds: the kind of each layer, in the order of the calls.
        count: the number of choices.

    Attributes:
        steps: the number of steps.
        longest: the number of layers in the longest stretch.
    """

    def __init__(self, kinds: list[int], count: int) -> None:
        sizes = {kind: kinds.count(kind) for kind in kinds}
        is_many = len(sizes) * MANY <= len(kinds)
        enough = max(math.ceil(MANY * count / size) for size in sizes.values())
        self.steps = max(min(enough, count), 2) if is_many else 3 * count
        # At least MANY stretches of each choice.
        lengths = {kind: size * self.steps // (MANY * count) if is_many else 1 for kind, size in sizes.items()}
        self._lengths = {kind: max(min(length, LONGEST), 1) for kind, length in lengths.items()}
        self.longest = max(self._lengths.values())
        self._stretches = {kind: math.ceil(size / self._lengths[kind]) for kind, size in sizes.items()}
        self._count = count
        self._places: list[tuple[int, int]] = []
        seen: dict[int, int] = {}
        for kind in kinds:
            self._places.append((kind, seen.get(kind, 0) // self._lengths[kind]))
            seen[kind] = seen.get(kind, 0) + 1

    def choices(self, step: int) -> list[int]:
        """Return the number of each layer's choice in a step. All choices follow stretch by stretch, step by step."""
        return [(stretch + step * self._stretches[kind]) % self._count for kind, stretch in self._places]


def offers_one_more(kinds: list[int], count: int) -> bool:
    """Whether checkpoints of one layer can be timed beside `count` other choices in no more steps."""
    pattern = Pattern(kinds, count + 1)
    return pattern.longest >= _LEAST_RUN and pattern.steps == Pattern(kinds, count).steps


def seconds_of(bench: Bench, order: list[str], kinds: list[int], levels: list[str]) -> "Seconds":
    """Time all choices.

    In each step the layers have different choices, so a machine that is slow for a while slows all choices down alike.
    """
    pattern = Pattern(kinds, len(levels))
    chosen, timed = [], []
    begins: dict[tuple[int, str], list[float]] = {}
    index_of = {name: index for index, name in enumerate(order)}
    twins: dict[tuple[int, ...], tuple[ChoiceByLayer, nn.Module]] = {}
    for step in range(pattern.steps):
        numbers = tuple(pattern.choices(step))
        if numbers not in twins:
            by_layer = ChoiceByLayer(
                {name: levels[number] for name, number in zip(order, numbers, strict=True)}, pattern.longest
            )
            twins[numbers] = by_layer, bench.twin(by_layer)
        by_layer, twin = twins[numbers]
        recorder, points = bench.step(f"times, {step + 1} of {pattern.steps}", twin, memory=False)
        if [bench.names[layer] for layer in recorder.outputs] != order:
            raise NotAChain(
                "layers are called in another order from step to step, or left out at random, so that other steps may "
                "take more memory"
            )
        chosen.append(list(by_layer.choices.values()))
        timed.append(_shared_in_runs(segments(points), by_layer, order))
        for run in by_layer.runs():
            for name in run:
                key = kinds[index_of[name]], by_layer.choices[name]
                begins.setdefault(key, []).append(1 / len(run))
    fitted = Seconds.fitted(timed, chosen, kinds)
    fitted.begins = {key: statistics.fmean(own) for key, own in begins.items()}
    return fitted


def _shared_in_runs(
    step: dict[Position, Segment], by_layer: ChoiceByLayer, order: list[str]
) -> dict[Position, Segment]:
    """Give all layers of a checkpoint the same share of its forward pass, and of its backward pass.

    The forward pass of the first layer begins the checkpoint, and the backward pass of the last runs all layers again.
    """
    index_of = {name: index for index, name in enumerate(order)}
    shared = dict(step)
    for run, part in itertools.product(by_layer.runs(), ("forward", "backward")):
        positions = [(part, index_of[name]) for name in run]
        mean = statistics.fmean(step[position].seconds for position in positions)
        shared |= {position: step[position]._replace(seconds=mean) for position in positions}
    return shared


# A pass, the kind of a layer, or the place of the code between layers, and the choice.
Group = tuple[str, int, str]


class Seconds:
    """The seconds of each segment at each choice, fitted to steps in which the layers have different choices.

    Segments of one pass, one kind of layer and one choice form a group. The model is: seconds of a segment = seconds of
    the group * slowness of the machine in that step. A disturbance of a single segment can only slow that segment down,
    so the slower ones are left out of the estimate of a group (see `_typical`).

    Attributes:
        begins: for each kind of layers and each checkpoint, how many checkpoints began in the timed steps per layer.
    """

    def __init__(self, by_group: dict[Group, float], kinds: list[int]) -> None:
        self.begins: dict[tuple[int, str], float] = {}
        self._by_group = by_group
        self._choices = {choice for _, _, choice in by_group}
        self._kinds = kinds

    def of(self, position: Position, choice: str) -> float:
        """Return the seconds of a layer's segment at a choice, or of the code between layers."""
        return self._by_group[_group_of(position, choice, self._kinds)]

    def has(self, choice: str) -> bool:
        """Whether the choice was timed."""
        return choice in self._choices

    def begin(self, index: int) -> float:
        """Return the seconds that a checkpoint from the i-th layer on adds once; 0.0 where that was not measured.

        The layers of checkpoints of one layer take the seconds of a layer and those of a beginning. The layers of
        longer checkpoints share the latter.
        """
        if not self.has(LONE_CHECKPOINT):
            return 0.0
        lone, shared = (
            sum(self.of((part, index), choice) for part in ("forward", "backward"))
            for choice in (LONE_CHECKPOINT, PLAIN_CHECKPOINT)
        )
        begins = self.begins[self._kinds[index], PLAIN_CHECKPOINT]
        return max(lone - shared, 0.0) / (1 - begins) if begins < 1 else 0.0

    def of_run(self, index: int, choice: str) -> tuple[float, float]:
        """Return the seconds of a layer's passes in a checkpoint, without those of a beginning."""
        share = self.begin(index) * self.begins.get((self._kinds[index], choice), 0.0)
        return self.of(("forward", index), choice), self.of(("backward", index), choice) - share

    def of_step(self, choice: str) -> float:
        """Return the seconds of a whole step with all layers at one choice."""
        layers = range(len(self._kinds))
        in_layers = sum(self.of((part, index), choice) for part in ("forward", "backward") for index in layers)
        return in_layers + sum(seconds for (part, _, _), seconds in self._by_group.items() if part.endswith("_gap"))

    @staticmethod
    def fitted(steps: list[dict[Position, Segment]], chosen: list[list[str]], kinds: list[int]) -> "Seconds":
        """Fit to `steps`, in each of which the i-th layer had the i-th choice of the step's list in `chosen`."""
        slowness = [1.0] * len(steps)
        for _ in range(4):
            samples: dict[Group, list[float]] = {}
            for step, choices, slow in zip(steps, chosen, slowness, strict=True):
                for position, segment in step.items():
                    group = _group_of(position, _choice_at(position, choices), kinds)
                    samples.setdefault(group, []).append(segment.seconds / slow)
            by_group = {group: _typical(own) for group, own in samples.items()}
            slowness = []
            for step, choices in zip(steps, chosen, strict=True):
                ratios = []
                for position, segment in step.items():
                    usual = by_group[_group_of(position, _choice_at(position, choices), kinds)]
                    if usual > 0:
                        ratios.append((segment.seconds / usual, usual))
                slowness.append(_weighted_median(ratios))
            usual = statistics.median(slowness)
            slowness = [slow / usual for slow in slowness]
        return Seconds(by_group, kinds)


def _typical(samples: list[float]) -> float:
    """Return the median of the faster half of a few samples; of many, the mean without the slowest quarter.

    Only a mean adds up to the seconds of many layers: Python's garbage collection, for one, slows down some of them.
    """
    samples = sorted(samples)
    if len(samples) < FEW:
        return statistics.median(samples[: (len(samples) + 1) // 2])
    return statistics.fmean(samples[: len(samples) * 3 // 4])


def _choice_at(position: Position, choices: list[str]) -> str:
    part, index = position
    return "" if part.endswith("_gap") else choices[index]


def _group_of(position: Position, choice: str, kinds: list[int]) -> Group:
    """Return the group of a segment. The code at each place between layers is a group of its own."""
    part, index = position
    return (part, index, "") if part.endswith("_gap") else (part, kinds[index], choice)


def _weighted_median(values: list[tuple[float, float]]) -> float:
    """Return the weighted median of pairs of value and weight; 1.0 of none."""
    half = sum(weight for _, weight in values) / 2
    for value, weight in sorted(values):
        half -= weight
        if half <= 0:
            return value
    return 1.0
