"""The seconds of each choice for each layer, from steps in which the layers have different choices."""

import statistics

from torch import nn

from .bench import Bench, ByLayer
from .marks import NotAChain, Segment, Where, segments

# If each kind has at least this many layers on average, one round of steps is enough; else there are three.
MANY = 4


def seconds_of(bench: Bench, order: list[str], kinds: list[int], levels: list[str]) -> "Seconds":
    """The seconds of all choices. In each step the choices of layers in a row are different, and over as many steps as
    there are choices each layer has each: so a machine that is slower for a while is so for all choices."""
    rounds = 1 if len(set(kinds)) * MANY <= len(kinds) else 3
    chosen, found = [], []
    turns = len(levels)
    twins: dict[int, nn.Module] = {}
    for step in range(rounds * turns):
        turn = step % turns
        choices = {name: levels[(place + turn) % turns] for place, name in enumerate(order)}
        if turn not in twins:
            twins[turn] = bench.twin(ByLayer(choices))
        recorder, points = bench.step(f"times, {step + 1} of {rounds * turns}", twins[turn], memory=False)
        if [bench.names[layer] for layer in recorder.outputs] != order:
            raise NotAChain("layers are called in another order from step to step, or left out at random")
        chosen.append(list(choices.values()))
        found.append(segments(points))
    return Seconds.fitted(found, chosen, kinds)


class Seconds:
    """The seconds of each segment at each choice.

    Fitted to steps in which layers have different choices: a segment's seconds are those of its kind and choice, times
    how slow the machine was in the step. What disturbs a segment alone only slows it, so of several the median of the
    faster half is taken.
    """

    def __init__(self, by_kind: dict[tuple[str, int, str], float], kinds: list[int]) -> None:
        self._by_kind = by_kind
        self._kinds = kinds

    def of(self, where: Where, choice: str) -> float:
        """Of a layer's segment at a choice, or of code between layers."""
        return self._by_kind[_class_of(where, choice, self._kinds)]

    def of_step(self, choice: str) -> float:
        """Of a whole step with all layers at one choice."""
        layers = range(len(self._kinds))
        found = sum(self.of((what, index), choice) for what in ("forward", "backward") for index in layers)
        return found + sum(seconds for (what, _, _), seconds in self._by_kind.items() if what.endswith("_gap"))

    @staticmethod
    def fitted(steps: list[dict[Where, Segment]], chosen: list[list[str]], kinds: list[int]) -> "Seconds":
        """By `steps`, in each of which the i-th layer had the i-th of the step's `chosen`."""
        slowness = [1.0] * len(steps)
        for _ in range(4):
            samples: dict[tuple[str, int, str], list[float]] = {}
            for step, choices, slow in zip(steps, chosen, slowness, strict=True):
                for where, segment in step.items():
                    of = _class_of(where, _choice_at(where, choices), kinds)
                    samples.setdefault(of, []).append(segment.seconds / slow)
            by_kind = {of: statistics.median(sorted(s)[: (len(s) + 1) // 2]) for of, s in samples.items()}
            slowness = []
            for step, choices in zip(steps, chosen, strict=True):
                ratios = []
                for where, segment in step.items():
                    usual = by_kind[_class_of(where, _choice_at(where, choices), kinds)]
                    if usual > 0:
                        ratios.append((segment.seconds / usual, usual))
                slowness.append(_weighted_median(ratios))
            usual = statistics.median(slowness)
            slowness = [slow / usual for slow in slowness]
        return Seconds(by_kind, kinds)


def _choice_at(where: Where, choices: list[str]) -> str:
    what, index = where
    return "" if what.endswith("_gap") else choices[index]


def _class_of(where: Where, choice: str, kinds: list[int]) -> tuple[str, int, str]:
    """What segments are taken for equal: a layer's by its kind and choice, those between layers each for itself."""
    what, index = where
    return (what, index, "") if what.endswith("_gap") else (what, kinds[index], choice)


def _weighted_median(values: list[tuple[float, float]]) -> float:
    """Of (value, weight)."""
    half = sum(weight for _, weight in values) / 2
    for value, weight in sorted(values):
        half -= weight
        if half <= 0:
            return value
    return 1.0
