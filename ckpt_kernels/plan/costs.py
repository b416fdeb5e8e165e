"""A training step as a chain of stages, and what each choice costs each stage.

Bytes are those that tensors take on the device beside parameters, their gradients, optimizer state and inputs.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

# The only choice of a stage whose code is no layer's.
FIXED = "fixed"


@dataclass(frozen=True)
class Cost:
    """What a stage costs at one choice.

    Attributes:
        kept: bytes that are there after its forward pass and were not before; its output counts.
        forward_peak: the most bytes within its forward pass, beyond what was there when it began.
        backward_peak: the most bytes within its backward pass, beyond what was there when it began.
        forward: seconds of its forward pass.
        backward: seconds of its backward pass.
        may_be_inside: whether it may be chosen within a checkpoint, whose first forward pass runs at the same choice
            and was measured at another.
    """

    kept: int
    forward_peak: int
    backward_peak: int
    forward: float
    backward: float
    may_be_inside: bool = True

    @property
    def seconds(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True)
class Checkpointed:
    """What the first of two forward passes of a stage costs, where nothing is kept for its backward pass.

    Attributes:
        kept: bytes that stay beside its output.
        forward_peak: the most bytes within, beyond what was there when it began.
        forward: its seconds.
        saved: seconds of the second forward pass that are saved where it ends a checkpoint: what follows the last
            tensor that is needed does not run.
    """

    kept: int
    forward_peak: int
    forward: float
    saved: float


@dataclass(frozen=True)
class Stage:
    """A part of a step: a layer, or what runs between two.

    Attributes:
        name: of the module; of other code, where it runs.
        kind: the name of the module's class.
        output: bytes of what it gives to the next.
        left: bytes that are there after both its passes and were not before either, whatever is chosen: the gradient
            of what it was given, less its output and that one's gradient.
        costs: by choice.
        checkpointed: as the inside of a checkpoint; None where it must not run twice, or has no choice that may be
            inside.
        follows: whether it takes the output of the stage before as it is, so that one checkpoint may span both.
        alike: a number that stages of equal structure and shapes share.
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
    def of(data: Mapping[str, Any]) -> "Stage":
        costs = {name: Cost(**cost) for name, cost in data["costs"].items()}
        checkpointed = data["checkpointed"] and Checkpointed(**data["checkpointed"])
        return Stage(**{**data, "costs": costs, "checkpointed": checkpointed})


@dataclass(frozen=True)
class StageAt:
    """A stage at a level, as it is spelled."""

    stage: int
    level: str


@dataclass(frozen=True)
class Checkpoint:
    """Stages in a row under one checkpoint: their input alone is kept, and what is inside is made again, and chosen
    anew, when the backward pass comes to the last of them."""

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
    """Those of all stages, in order."""
    found: list[StageAt] = []
    for part in assignment:
        found += [part] if isinstance(part, StageAt) else stages_of(part.inside)
    return found
