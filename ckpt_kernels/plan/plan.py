"""A plan: which layer keeps what, what that costs, and how a model is made to compute so."""

import hashlib
import json
import math
import pathlib
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from ..convert import Report, convert, revert
from ..convert.module_tree import modules_of, named_modules
from ..convert.swap import original_of
from ..functional.checks import is_count
from ..levels import NONE, OF_LAYERS, Policy
from ..runs import Place, is_sharded
from . import report
from .bench import StepCost, shape_given
from .costs import FIXED, Assignment, Checkpoint, Stage, StageAt, stages_of
from .ways import predicted


@dataclass(frozen=True)
class Plan:
    """The choice for each layer of a model, with what was measured to find it.

    Bytes are those that a training step makes on the device beside parameters, their gradients, optimizer state and
    inputs. Seconds are of a step's forward and backward pass.

    Attributes:
        budget: the bytes that were given; None if none were.
        assignment: the choices, in the order of the forward pass.
        predicted: the step that the costs predict.
        measured: the step as it was measured with the plan applied.
        steps: whole steps as they were measured, with all layers at one choice; "eager" is the model as it was.
        bound: the seconds below which no assignment of these choices within the budget can be.
        frontier: bytes and seconds of the best assignments for every amount of memory.
        stages: the chain that was solved for.
        layers: for each stage the name of its module; "" for code between layers.
        structure: a digest of the names, classes and shapes of the model's modules and parameters.
        shapes: of the tensors that each layer was called with.
        given: the shape of the first tensor that the model was called with; () where there was none.
        whole: one level for the whole model, where its layers could not be chosen for one by one; "none" also where the
            model as it is turned out the fastest.
        note: why not, and what else is to be known.
        count: how many steps were made to find the plan.
    """

    budget: int | None
    assignment: Assignment
    predicted: StepCost
    measured: StepCost
    steps: dict[str, StepCost]
    bound: float
    frontier: list[tuple[int, float]]
    stages: list[Stage]
    layers: list[str]
    structure: str
    shapes: dict[str, tuple]
    given: tuple[int, ...] = ()
    whole: str | None = None
    note: str = ""
    count: int = 0
    _model: "list[weakref.ref[nn.Module]]" = field(default_factory=list, compare=False, repr=False)

    def apply(self, model: nn.Module | None = None, *, logits: str | None = None, tiles: int = 1) -> Report:
        """Converts the model that the plan was made for, or another of the same structure.

        Args:
            model: by default the one that the plan was made for.
            logits, tiles: see `ckpt_kernels.convert`. The plan's figures are of steps without them. Layers that the
                plan has in tiles stay in so many. Where the plan leaves the model as it is, either of these converts
                the model at "output", which keeps no more than the model does.

        Returns:
            The report of `convert`.

        Raises:
            ValueError: the plan was read from a file and no model is given, the model is of another structure, or
                `logits` or `tiles` is not what `convert` takes.
        """
        model = self._its(model)
        if self.whole == NONE:
            self._check(model)
            if logits is not None or tiles != 1:
                return convert(model, recompute="output", logits=logits, tiles=tiles)
            revert(model)
            return Report(NONE, "torch", [], [])
        return convert(model, recompute=self, logits=logits, tiles=tiles)

    def revert(self, model: nn.Module | None = None) -> None:
        """Gives the model's modules their own forward back; see `ckpt_kernels.revert`."""
        revert(self._its(model))

    def _its(self, model: nn.Module | None) -> nn.Module:
        if model is None:
            model = self._model[0]() if self._model else None
        if model is None:
            raise ValueError("no model is given, and the one that the plan was made for is not there; expected a model")
        return model

    def levels_in(self, model: nn.Module) -> Mapping[str, tuple[str, tuple[Place, ...]]]:
        """For `convert`: by the layers' names their levels, and where each is in checkpointed runs."""
        self._check(model)
        found: dict[str, tuple[str, tuple[Place, ...]]] = {}
        self._place(self.assignment, (), found, [0])
        return found

    def _place(
        self,
        parts: Assignment,
        runs: tuple[tuple[int, Checkpoint], ...],
        found: dict[str, tuple[str, tuple[Place, ...]]],
        key: list[int],
    ) -> None:
        for part in parts:
            if isinstance(part, Checkpoint):
                key[0] += 1
                self._place(part.inside, (*runs, (key[0], part)), found, key)
            elif part.level != FIXED:
                places = (Place(k, part.stage - run.first, part.stage == run.last) for k, run in runs)
                found[self.layers[part.stage]] = part.level, tuple(places)

    def _check(self, model: nn.Module) -> None:
        if any(map(is_sharded, modules_of(model))):
            raise ValueError("the model is sharded; expected a model that is not: apply the plan, then shard")
        found = structure_of(model)
        if found != self.structure:
            raise ValueError(
                "the model is of another structure (names, classes and shapes of its modules) than the one that the "
                "plan was made for; expected the same, or a new plan"
            )

    def predict(self, *inputs: Any, **kwargs: Any) -> StepCost:
        """What a step would take at another batch or length: an estimate from shapes alone, no step is made.

        Bytes and seconds are those of the step that was measured, times how many more elements the first tensor has.
        So what does not grow with it, a gradient of a weight before it is added, is counted as if it did, and what
        grows faster, attention that writes its scores down, as if it did not. Only a plan for these inputs is sure to
        fit.

        Args:
            inputs, kwargs: what the model would be called with.

        Raises:
            ValueError: the first tensor has another number of dimensions than that of the plan, or there is none.

        Example:
            >>> layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
            >>> model = torch.nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
            >>> plan = ckpt_kernels.plan(model, torch.randn(2, 64, 32), budget=0.6)
            >>> plan.predict(torch.randn(4, 64, 32)).peak == 2 * plan.measured.peak
            True
        """
        shape = shape_given(inputs, kwargs)
        if not shape or len(shape) != len(self.given):
            raise ValueError(f"the first tensor is of shape {shape}; expected as many dimensions as {self.given} has")
        ratio = math.prod(shape) / max(math.prod(self.given), 1)
        return StepCost(math.ceil(self.measured.peak * ratio), self.measured.seconds * ratio)

    def save(self, path: str | pathlib.Path) -> None:
        """Writes the plan as JSON."""
        pathlib.Path(path).write_text(json.dumps(self.as_dict(), indent=1))

    @staticmethod
    def load(path: str | pathlib.Path) -> "Plan":
        """Reads a plan that was saved.

        Raises:
            ValueError: the file holds none.
        """
        try:
            made = _of(json.loads(pathlib.Path(path).read_text()))
            predicted(made.stages, made.assignment)
            _check_parts(made)
            str(made)
            return made
        except KeyError as error:
            raise ValueError(f"{path} holds no plan: it has no {error}; {_EXPECTED}") from error
        except (IndexError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} holds no plan: {error}; {_EXPECTED}") from error

    def as_dict(self) -> dict[str, Any]:
        """All of it as data."""
        data = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return data | {
            "assignment": [_described(part) for part in self.assignment],
            "predicted": asdict(self.predicted),
            "measured": asdict(self.measured),
            "steps": {name: asdict(step) for name, step in self.steps.items()},
            "stages": [stage.as_dict() for stage in self.stages],
            "frontier": [list(label) for label in self.frontier],
            "version": _VERSION,
            "torch": torch.__version__,
        }

    @property
    def levels(self) -> dict[str, str]:
        """The level of each layer by its name; "checkpoint, output" is that of one in a checkpoint."""
        found = {}
        for part in self.assignment:
            for choice in stages_of((part,)):
                if choice.level != FIXED:
                    prefix = "checkpoint, " if isinstance(part, Checkpoint) else ""
                    found[self.layers[choice.stage]] = prefix + choice.level
        return found

    def __str__(self) -> str:
        return report.text(self)

    def draw(self, path: str | pathlib.Path) -> None:
        """A PNG: time against peak, of the frontier, the plan, and all layers at one choice. Needs matplotlib."""
        report.draw(self, path)


# Of files of plans.
_VERSION = 2
_EXPECTED = "expected a file that Plan.save wrote"


def structure_of(model: nn.Module) -> str:
    """A digest of the names, classes and shapes of a model's modules and parameters, converted or not."""
    digest = hashlib.sha256()
    for name, module in named_modules(model):
        shapes = [(key, tuple(p.shape)) for key, p in module._parameters.items() if p is not None]
        digest.update(repr((name, original_of(module).__qualname__, shapes)).encode())
    return digest.hexdigest()


def _check_parts(made: Plan) -> None:
    """Raises ValueError for a budget that is none, and choices that are not those of the stages, each in its order."""
    if made.budget is not None and not is_count(made.budget):
        raise ValueError(f"its budget is {made.budget!r}")
    chosen = stages_of(made.assignment)
    if [choice.stage for choice in chosen] != list(range(len(made.stages) if made.whole is None else 0)):
        raise ValueError("its choices are not one for each stage")
    if len(made.layers) != len(made.stages):
        raise ValueError(f"it has {len(made.layers)} names for {len(made.stages)} stages")
    named = [name for name in made.layers if name]
    if len(set(named)) != len(named):
        raise ValueError("two of its stages have the same name")
    for name, step in {"measured": made.measured, **made.steps}.items():
        if not all(value >= 0 for value in asdict(step).values()):
            raise ValueError(f"the step {name!r} is {step}")
    levels = {choice.level for choice in chosen} | ({made.whole} if made.whole is not None else set())
    for level in levels - {FIXED}:
        Policy.of(level, OF_LAYERS, "a level in it")


def _described(part: StageAt | Checkpoint) -> Any:
    return [part.stage, part.level] if isinstance(part, StageAt) else {"run": [_described(p) for p in part.inside]}


def _part(data: Any) -> StageAt | Checkpoint:
    return Checkpoint(tuple(map(_part, data["run"]))) if isinstance(data, dict) else StageAt(*data)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _of(data: dict[str, Any]) -> Plan:
    if data["version"] != _VERSION:
        raise ValueError(f"it is of version {data['version']!r}, not {_VERSION}")
    names = ("budget", "bound", "layers", "structure", "whole", "note", "count")
    return Plan(
        **{name: data[name] for name in names},
        assignment=tuple(map(_part, data["assignment"])),
        predicted=StepCost(**data["predicted"]),
        measured=StepCost(**data["measured"]),
        steps={name: StepCost(**step) for name, step in data["steps"].items()},
        stages=[Stage.of(stage) for stage in data["stages"]],
        frontier=[(int(need), float(seconds)) for need, seconds in data["frontier"]],
        shapes={name: _tuples(shapes) for name, shapes in data["shapes"].items()},
        given=tuple(data["given"]),
    )
