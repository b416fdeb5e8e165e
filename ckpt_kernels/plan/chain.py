"""The transitions of the dynamic program over a chain of stages, and the recurrence for memory and time.

From each stage several *transitions* lead on: each level of that stage, and each checkpoint that may begin there. The
need of a transition over stages s..e, followed by the rest e+1..t of the chain, is in bytes above the bytes allocated
when s begins. The need is the maximum of

- `forward_peak`: the peak of the forward pass of s..e;
- `kept` + the need of the rest: the bytes that s..e keep are allocated while the rest runs forward and backward;
- `base` + the need of the inside: when the backward pass reaches s..e, the bytes that s..e keep and the bytes that the
  rest leaves are allocated. A level's own backward pass is counted in `base`, and its inside needs nothing. The inside
  of a checkpoint is the second run of the same stages, each at a level that may stand inside.

The seconds are the sum of the transition's own, those of the rest, and those of the inside. `solve` and `predicted` use
no other model of a step.

The backward pass of an offloaded layer first copies the layer's tensors back to the device, and prefetches those of the
next offloaded layer, which are on the device while all layers in between run backward. So in an assignment with
offloaded layers the *reserve*, the largest number of bytes that one of them moves, counts as left by the last stage,
the code after the last layer: for the backward pass of all layers but the first, during which nothing is prefetched.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from .costs import FIXED, Assignment, Stage, StageAt, first_of, last_of, stages_of

# A checkpoint may span any number of stages up to ALL_LENGTHS, and some numbers up to LONGEST (see `is_length`).
ALL_LENGTHS = 32
LONGEST = 256
# The need of an empty rest: low enough that `kept` + need never is the maximum.
NOTHING = -(2**62)


class Transition(NamedTuple):
    """A level of a stage, or a checkpoint that begins at that stage.

    Attributes:
        level: the level; None for a checkpoint.
        end: the last stage of the transition.
        forward_peak, kept: see the module's docstring.
        own: the peak of the backward pass above the kept bytes and the bytes that the rest leaves.
        seconds: seconds without the inside.
    """

    level: str | None
    end: int
    forward_peak: int
    kept: int
    own: int
    seconds: float


class Chain:
    """The transitions of a chain of stages.

    Args:
        stages: in the order of the forward pass.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = stages
        # left[n]: the bytes that the first n stages leave.
        self.left = [0, *itertools.accumulate(stage.left for stage in stages)]
        self._transitions: dict[tuple[int, bool], list[Transition]] = {}

    def transitions(self, first: int, nested: bool) -> list[Transition]:
        """Return the levels of a stage, then the checkpoints that may begin there, in the order of their ends."""
        key = first, nested
        if key not in self._transitions:
            checkpoints = (one for one in self.checkpoints_from(first) if is_length(one.end - first + 1))
            self._transitions[key] = [*self.levels_of(first, nested), *checkpoints]
        return self._transitions[key]

    def levels_of(self, index: int, nested: bool) -> Iterator[Transition]:
        for level, cost in self.stages[index].costs.items():
            if cost.may_be_inside or not nested:
                seconds = cost.seconds + cost.inside if nested else cost.seconds
                yield Transition(level, index, cost.forward_peak, cost.kept, cost.backward_peak, seconds)

    def level_of(self, index: int, level: str, nested: bool) -> Transition:
        by_level = {transition.level: transition for transition in self.levels_of(index, nested)}
        if level not in by_level:
            at = f"{level!r} in a checkpoint" if nested else repr(level)
            expected = ", ".join(filter(None, by_level))
            raise ValueError(f"stage {self.stages[index].name!r} is at {at}; expected one of {expected}")
        return by_level[level]

    def checkpoint(self, first: int, last: int) -> Transition:
        checkpoint = next((one for one in self.checkpoints_from(first) if one.end == last), None)
        if checkpoint is None:
            names = f"{self.stages[first].name!r} to {self.stages[last].name!r}"
            raise ValueError(f"stages {names} are in a checkpoint; expected stages in a row that may run twice")
        return checkpoint

    def checkpoints_from(self, first: int) -> Iterator[Transition]:
        """Yield checkpoints of every length over stages that may run twice and follow each other."""
        forward_peak, kept, seconds, before = 0, 0, 0.0, 0
        for end in range(first, min(first + LONGEST, len(self.stages))):
            stage = self.stages[end]
            if stage.checkpointed is None or (end > first and not stage.follows):
                return
            if end == first:
                seconds = stage.checkpointed.begin
            # The output of the stage before is freed only when this stage has computed its own output.
            forward_peak = max(forward_peak, kept + before + stage.checkpointed.forward_peak)
            kept += stage.checkpointed.kept
            seconds += stage.checkpointed.forward
            before = stage.output
            yield Transition(None, end, forward_peak, kept + stage.output, 0, seconds - stage.checkpointed.saved)

    def after(self, last: int, nested: bool) -> int:
        """Return the bytes that the stages up to the last of a piece leave.

        The second forward pass in a checkpoint frees the output of the piece at once.
        """
        return self.left[last + 1] - (self.stages[last].output if nested else 0)

    def base(self, transition: Transition) -> int:
        """Return the bytes allocated when the backward pass reaches a transition, less `after` of the piece."""
        return transition.kept + transition.own - self.left[transition.end + 1]


def predicted(stages: Sequence[Stage], assignment: Assignment) -> tuple[int, float]:
    """Return the peak in bytes and the seconds of a step with an assignment.

    Raises:
        ValueError: a stage does not have the level assigned; a checkpoint has stages that may not run twice, or that
            do not follow each other.
    """
    costs = (stages[at.stage].costs.get(at.level) for at in stages_of(assignment))
    reserve = max((cost.offloaded for cost in costs if cost), default=0)
    need, seconds = _need_and_seconds(Chain(with_reserve(stages, reserve)), assignment, nested=False)
    return max(need, 0), seconds


def with_reserve(stages: Sequence[Stage], reserve: int) -> Sequence[Stage]:
    """Return the chain in which the last stage leaves the reserve too, and the stage after the first layer frees it."""
    if not reserve:
        return stages
    chain = list(stages)
    first = next(index for index, stage in enumerate(stages) if FIXED not in stage.costs)
    # Like no other stage: the numbers of stages that are alike are not negative.
    for index, left in ((len(chain) - 1, reserve), (min(first + 1, len(chain) - 1), -reserve)):
        chain[index] = replace(chain[index], left=chain[index].left + left, alike=-1 - index)
    return chain


def _need_and_seconds(chain: Chain, parts: Assignment, nested: bool) -> tuple[int, float]:
    """Apply the recurrence of the module's docstring to the parts, from the last to the first."""
    need, seconds = NOTHING, 0.0
    for part in reversed(parts):
        first, end = first_of(part), last_of(part)
        if isinstance(part, StageAt):
            transition = chain.level_of(first, part.level, nested)
            inside, inside_seconds = 0, 0.0
        else:
            transition = chain.checkpoint(first, end)
            inside, inside_seconds = _need_and_seconds(chain, part.inside, nested=True)
        base = chain.base(transition) + chain.after(last_of(parts[-1]), nested)
        need = max(transition.forward_peak, need + transition.kept, base + inside)
        seconds += transition.seconds + inside_seconds
    return need, seconds


def is_length(stages: int) -> bool:
    """Whether a checkpoint may span that many stages: 1 to `ALL_LENGTHS`, then two a doubling: 48, 64, 96, 128, ..."""
    half = ALL_LENGTHS // 2
    while stages >= 4 * half:
        half *= 2
    return stages <= ALL_LENGTHS or stages % half == 0
