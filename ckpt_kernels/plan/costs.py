"""Data types for a training step as a chain of stages: the cost of each choice, and an assignment of choices.

All bytes exclude parameters, gradients, optimizer state and inputs.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

# The only choice of a stage that is code between layers.
FIXED = "fixed"


@dataclass(frozen=True)
class Cost:
    """The cost of a stage at one choice.

    Attributes:
        kept: bytes allocated in the forward pass and still allocated at the end of the pass, the output included.
        forward_peak: the peak of the forward pass, in bytes above the bytes at the start of the pass.
        backward_peak: the peak of the backward pass, in bytes above the bytes at the start of the pass.
        forward: seconds of the forward pass.
        backward: seconds of the backward pass.
        may_be_inside: whether the choice may stand within a checkpoint. The first forward pass of a checkpoint runs
            with as many tiles as the choice inside, and was measured with one number of tiles only.
        inside: seconds that the choice adds within a checkpoint, where the stage runs twice, beside those of
            `Checkpointed`, which are the same for all choices.
        offloaded: bytes in host memory from the forward to the backward pass. `backward_peak` includes these bytes.
    """

    kept: int
    forward_peak: int
    backward_peak: int
    forward: float
    backward: float
    may_be_inside: bool = True
    inside: float = 0.0
    offloaded: int = 0

    @property
    def seconds(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True)
class Checkpointed:
    """The cost of the first forward pass of a stage in a checkpoint, which keeps nothing for the backward pass.

    Attributes:
        kept: bytes that stay allocated beside the output.
        forward_peak: the peak of the pass, in bytes above the bytes at the start of the pass.
        forward: seconds of the pass, and what a second run takes beyond the first, for the choice that adds least.
        saved: seconds that the second forward pass saves if the stage is the last of a checkpoint. That pass stops at
            the last tensor that the backward pass needs.
        begin: seconds that a checkpoint adds once, however many stages it spans, if the stage is the first.
    """

    kept: int
    forward_peak: int
    forward: float
    saved: float
    begin: float = 0.0


@dataclass(frozen=True)
class Stage:
    """A part of a step: a layer, or the code between two layers.

    Attributes:
        name: the name of the module, or a description of the place of the code.
        kind: the name of the module's class; "" for code between layers.
        output: bytes of the stage's output.
        left: the net change in allocated bytes over both passes: the gradient of the stage's input, less the output
            and the output's gradient. The choice does not affect this number.
        costs: the cost of each choice.
        checkpointed: the cost inside a checkpoint; None if the stage must not run twice, or has no choice that may
            stand inside.
        follows: whether the stage takes the output of the stage before unchanged, so that one checkpoint may span both.
        alike: a number that stages of equal costs share.
    """

    name: str
    kind: str
    output: int
    left: int
    costs: Mapping[str, Cost]
    checkpointed: Checkpointed | None = None
    follows: bool = False
    alike: int = field(default=0)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"costs": {name: asdict(cost) for name, cost in self.costs.items()}}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "Stage":
        costs = {name: Cost(**cost) for name, cost in data["costs"].items()}
        checkpointed = data["checkpointed"] and Checkpointed(**data["checkpointed"])
        return Stage(**{**data, "costs": costs, "checkpointed": checkpointed})


@dataclass(frozen=True)
class StageAt:
    """A stage, by number, and the level chosen for it, as `convert` spells levels."""

    stage: int
    level: str


@dataclass(frozen=True)
class Checkpoint:
    """Adjacent stages under one checkpoint, which keeps their input alone.

    The backward pass runs the stages again, each at the choice that `inside` gives.
    """

    inside: tuple["StageAt | Checkpoint", ...]

    @property
    def first(self) -> int:
        return first_of(self.inside[0])

    @property
    def last(self) -> int:
        return last_of(self.inside[-1])


Assignment = tuple[StageAt | Checkpoint, ...]


def first_of(part: StageAt | Checkpoint) -> int:
    return part.stage if isinstance(part, StageAt) else part.first


def last_of(part: StageAt | Checkpoint) -> int:
    return part.stage if isinstance(part, StageAt) else part.last


def stages_of(assignment: Assignment) -> list[StageAt]:
    """Return the choices of all stages in order, those inside checkpoints too."""
    choices: list[StageAt] = []
    for part in assignment:
        choices += [part] if isinstance(part, StageAt) else stages_of(part.inside)
    return choices
