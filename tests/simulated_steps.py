"""A simulated training step of a chain of stages: the reference for the planner's recurrences."""

from collections.abc import Sequence
from dataclasses import dataclass

from ckpt_kernels.plan.costs import Assignment, Stage, StageAt, stages_of


def simulated(stages: Sequence[Stage], assignment: Assignment) -> tuple[int, float]:
    """The peak in bytes and the seconds of a step that is simulated stage by stage."""
    clock = _Clock()
    _forward(stages, assignment, clock)
    _backward(stages, assignment, clock)
    return clock.peak, clock.seconds


@dataclass
class _Clock:
    level: int = 0
    # Bytes of the next offloaded stage that are on the device already.
    prefetched: int = 0
    peak: int = 0
    seconds: float = 0.0

    def reach(self, beyond: int) -> None:
        self.peak = max(self.peak, self.level + beyond)


def _forward(stages: Sequence[Stage], assignment: Assignment, clock: _Clock) -> None:
    for part in assignment:
        if isinstance(part, StageAt):
            cost = stages[part.stage].costs[part.level]
            clock.reach(cost.forward_peak)
            clock.level += cost.kept
            clock.seconds += cost.forward
            continue
        if (begins := stages[part.first].checkpointed) is not None:
            clock.seconds += begins.begin
        for index in range(part.first, part.last + 1):
            first = stages[index].checkpointed
            if first is None:
                raise ValueError(f"stage {stages[index].name!r} is in a run; expected one that may run twice")
            # The output of the stage before is alive until this stage has made its own.
            before = stages[index - 1].output if index > part.first else 0
            clock.reach(before + first.forward_peak)
            clock.level += first.kept
            clock.seconds += first.forward
        clock.level += stages[part.last].output


def _backward(stages: Sequence[Stage], assignment: Assignment, clock: _Clock) -> None:
    for place, part in reversed(list(enumerate(assignment))):
        if isinstance(part, StageAt):
            stage, cost = stages[part.stage], stages[part.stage].costs[part.level]
            if cost.offloaded:
                # `backward_peak` counts the stage's own tensors.
                clock.level -= clock.prefetched
                clock.prefetched = _offloaded_last(stages, assignment[:place])
                clock.level += clock.prefetched
            clock.reach(cost.backward_peak)
            clock.level += stage.left - cost.kept
            clock.seconds += cost.backward
            continue
        last = stages[part.last]
        _forward(stages, part.inside, clock)
        # No stage reads the last output of the second pass.
        clock.level -= last.output
        clock.seconds -= last.checkpointed.saved if last.checkpointed else 0.0
        _backward(stages, part.inside, clock)
        # Up to here as if the run had kept nothing; the tensors that its first pass kept are freed now.
        clock.level -= sum(c.kept for s in stages[part.first : part.last + 1] if (c := s.checkpointed))


def _offloaded_last(stages: Sequence[Stage], assignment: Assignment) -> int:
    """The bytes that the last offloaded stage moves; 0 without one."""
    moved = (stages[at.stage].costs[at.level].offloaded for at in stages_of(assignment))
    return next(filter(None, reversed(list(moved))), 0)
