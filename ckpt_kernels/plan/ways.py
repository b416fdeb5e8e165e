"""How a chain may be gone through, and the recurrence of what it costs.

From a stage on there are several *ways*: each level of that stage, and each checkpoint that may begin there. What a
way through stages s..e needs, with the rest of the chain e+1..t, beyond what there is when s begins, is the most of

- `forward_peak`: what s..e take in their forward pass;
- `kept` + the need of the rest: what s..e keep stands while the rest runs, forward and backward;
- `base` + the need of the inside: when the backward pass comes to s..e there are what they keep and what the rest
  leaves. On top comes, for a level, its own backward pass, which is counted in `base` (the inside needs nothing), and
  for a checkpoint the need of the same stages when they run again, each with a way of its own, of those that may be
  inside.

The seconds are those of the way, of the rest, and of the inside. This is all that `solve` and `predicted` know of
steps.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .costs import Assignment, Stage, StageAt, first_of, last_of

# A checkpoint may span any number of stages up to that, and some numbers beyond.
ALL_LENGTHS = 16
LONGEST = 256
# What the rest of a chain needs where there is none: less than anything, so that what is kept before it is no peak.
NOTHING = -(2**62)


class Way(NamedTuple):
    """A level of a stage, or a checkpoint over it and stages behind it.

    Attributes:
        level: None is a checkpoint.
        end: the last of its stages.
        forward_peak, kept: as above.
        own: bytes of its backward pass beside what it keeps and what the rest leaves.
        seconds: without what is inside.
    """

    level: str | None
    end: int
    forward_peak: int
    kept: int
    own: int
    seconds: float


class Chain:
    """The ways through stages.

    Args:
        stages: in the order of the forward pass.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = stages
        # What the first n stages leave, by n.
        self.left = [0, *itertools.accumulate(stage.left for stage in stages)]
        self._ways: dict[tuple[int, bool], list[Way]] = {}

    def ways(self, first: int, nested: bool) -> list[Way]:
        """The levels of a stage, and the checkpoints that may begin there, in the order of their ends."""
        key = first, nested
        if key not in self._ways:
            checkpoints = (way for way in self.checkpoints_from(first) if is_length(way.end - first + 1))
            self._ways[key] = [*self.levels_of(first, nested), *checkpoints]
        return self._ways[key]

    def levels_of(self, index: int, nested: bool) -> Iterator[Way]:
        for level, cost in self.stages[index].costs.items():
            if cost.may_be_inside or not nested:
                yield Way(level, index, cost.forward_peak, cost.kept, cost.backward_peak, cost.seconds)

    def level_of(self, index: int, level: str, nested: bool) -> Way:
        ways = {way.level: way for way in self.levels_of(index, nested)}
        if level not in ways:
            at = f"{level!r} in a checkpoint" if nested else repr(level)
            expected = ", ".join(filter(None, ways))
            raise ValueError(f"stage {self.stages[index].name!r} is at {at}; expected one of {expected}")
        return ways[level]

    def checkpoint(self, first: int, last: int) -> Way:
        found = next((way for way in self.checkpoints_from(first) if way.end == last), None)
        if found is None:
            names = f"{self.stages[first].name!r} to {self.stages[last].name!r}"
            raise ValueError(f"stages {names} are in a checkpoint; expected stages in a row that may run twice")
        return found

    def checkpoints_from(self, first: int) -> Iterator[Way]:
        """Of any length, as long as stages may run twice and follow each other."""
        forward_peak, kept, seconds, before = 0, 0, 0.0, 0
        for end in range(first, min(first + LONGEST, len(self.stages))):
            stage = self.stages[end]
            if stage.checkpointed is None or (end > first and not stage.follows):
                return
            # The output of the stage before stands until this one has its own.
            forward_peak = max(forward_peak, kept + before + stage.checkpointed.forward_peak)
            kept += stage.checkpointed.kept
            seconds += stage.checkpointed.forward
            before = stage.output
            yield Way(None, end, forward_peak, kept + stage.output, 0, seconds - stage.checkpointed.saved)

    def after(self, last: int, nested: bool) -> int:
        """What the stages up to the last of a piece leave. In a second forward pass its output goes at once."""
        return self.left[last + 1] - (self.stages[last].output if nested else 0)

    def base(self, way: Way) -> int:
        """What is there when the backward pass comes to a way, less `after` the piece that it is in."""
        return way.kept + way.own - self.left[way.end + 1]


def predicted(stages: Sequence[Stage], assignment: Assignment) -> tuple[int, float]:
    """The peak in bytes and the seconds of a step with an assignment.

    Raises:
        ValueError: a stage has no such level there; a checkpoint has stages that may not run twice, or that do not
            follow each other.
    """
    need, seconds = _through(Chain(stages), assignment, nested=False)
    return max(need, 0), seconds


def _through(chain: Chain, parts: Assignment, nested: bool) -> tuple[int, float]:
    need, seconds = NOTHING, 0.0
    for part in reversed(parts):
        first, end = first_of(part), last_of(part)
        if isinstance(part, StageAt):
            way = chain.level_of(first, part.level, nested)
            inside, inside_seconds = 0, 0.0
        else:
            way = chain.checkpoint(first, end)
            inside, inside_seconds = _through(chain, part.inside, nested=True)
        base = chain.base(way) + chain.after(last_of(parts[-1]), nested)
        need = max(way.forward_peak, need + way.kept, base + inside)
        seconds += way.seconds + inside_seconds
    return need, seconds


def is_length(stages: int) -> bool:
    """Every length up to `ALL_LENGTHS`, and beyond that two to a doubling: 24, 32, 48, 64, ..."""
    half = ALL_LENGTHS // 2
    while stages >= 4 * half:
        half *= 2
    return stages <= ALL_LENGTHS or stages % half == 0
