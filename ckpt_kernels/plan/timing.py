"""Measures the seconds of each choice for each layer, in steps in which the layers have different choices."""

import statistics

from torch import nn

from .bench import Bench, ChoiceByLayer
from .marks import NotAChain, Position, Segment, segments

# If each kind has at least this many layers on average, one round of steps is enough; otherwise there are three.
MANY = 4


def seconds_of(bench: Bench, order: list[str], kinds: list[int], levels: list[str]) -> "Seconds":
    """Time all choices.

    In each step adjacent layers have different choices, and over one round of steps each layer has each choice. A
    machine that is slow for a while therefore slows all choices down alike.
    """
    rounds = 1 if len(set(kinds)) * MANY <= len(kinds) else 3
    chosen, timed = [], []
    turns = len(levels)
    twins: dict[int, nn.Module] = {}
    for step in range(rounds * turns):
        turn = step % turns
        choices = {name: levels[(place + turn) % turns] for place, name in enumerate(order)}
        if turn not in twins:
            twins[turn] = bench.twin(ChoiceByLayer(choices))
        recorder, points = bench.step(f"times, {step + 1} of {rounds * turns}", twins[turn], memory=False)
        if [bench.names[layer] for layer in recorder.outputs] != order:
            raise NotAChain("layers are called in another order from step to step, or left out at random")
        chosen.append(list(choices.values()))
        timed.append(segments(points))
    return Seconds.fitted(timed, chosen, kinds)


# A pass, the kind of a layer, or the place of the code between layers, and the choice.
Group = tuple[str, int, str]


class Seconds:
    """The seconds of each segment at each choice, fitted to steps in which the layers have different choices.

    Segments of one pass, one kind of layer and one choice form a group. The model is: seconds of a segment = seconds of
    the group * slowness of the machine in that step. A disturbance of a single segment can only slow that segment down,
    so the estimate of a group is the median of the faster half.
    """

    def __init__(self, by_group: dict[Group, float], kinds: list[int]) -> None:
        self._by_group = by_group
        self._kinds = kinds

    def of(self, position: Position, choice: str) -> float:
        """Return the seconds of a layer's segment at a choice, or of the code between layers."""
        return self._by_group[_group_of(position, choice, self._kinds)]

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
            by_group = {group: statistics.median(sorted(s)[: (len(s) + 1) // 2]) for group, s in samples.items()}
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
