"""The result of planning: a choice for each layer, the cost of a step, and the conversion of a model accordingly."""

import hashlib
import itertools
import json
import math
import pathlib
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from ..arguments import is_count
from ..convert import Report, convert, revert
from ..convert.module_tree import modules_of, named_modules
from ..convert.swap import original_of
from ..levels import NONE, OF_LAYERS, Policy
from ..runs import Place, is_sharded
from . import report
from .bench import StepCost, first_shape
from .chain import predicted
from .costs import FIXED, Assignment, Checkpoint, Stage, StageAt, stages_of


class ModelReference:
    """A weak reference to the model that a plan was made for. Copies of the plan share it, and pickles leave it out."""

    def __init__(self, model: nn.Module | None = None) -> None:
        self._reference = None if model is None else weakref.ref(model)

    def __call__(self) -> nn.Module | None:
        return None if self._reference is None else self._reference()

    def __deepcopy__(self, memo: dict[int, Any]) -> "ModelReference":
        return self

    def __reduce__(self) -> tuple:
        return ModelReference, ()


@dataclass(frozen=True)
class Plan:
    """The choice for each layer of a model, with the measurements behind the choices.

    All bytes exclude parameters, gradients, optimizer state and inputs. Seconds cover a forward and a backward pass.

    Attributes:
        budget: the budget in bytes; None without a budget.
        assignment: the choices, in the order of the forward pass.
        predicted: the predicted cost of a step with the plan.
        measured: the measured cost of a step with the plan.
        steps: measured costs of steps with all layers at one choice, by choice; "eager" is the model as it is.
        bound: a lower bound on the seconds of every assignment within the budget, by the measured costs.
        frontier: bytes and seconds of the best assignments for every amount of memory.
        stages: the chain of stages that was solved.
        layers: the module name of each stage; "" for code between layers.
        structure: a digest of the names, classes and shapes of the model's modules and parameters.
        shapes: shapes and dtypes of the tensors that each layer was called with.
        given: the shape of the first tensor that the model was called with; () without one.
        whole: the one level of the whole model, if the layers could not be planned one by one; "none" also if the model
            as it is was the fastest. Otherwise None.
        note: the reason for `whole`, and remarks on the measurements.
        count: how many steps were run to find the plan.
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
    _model: ModelReference = field(default_factory=ModelReference, compare=False, repr=False)

    def apply(self, model: nn.Module | None = None, *, logits: str | None = None, tiles: int = 1) -> Report:
        """Convert the model that the plan was made for, or another of the same structure.

        Args:
            model: by default the model that the plan was made for.
            logits, tiles: see `ckpt_kernels.convert`. The plan's figures are for steps without these options. Layers
                with tiles in the plan keep the plan's number of tiles. If the plan leaves the model as it is, either
                option converts the model at "output", which keeps no more than the model does.

        Returns:
            The report of `convert`.

        Raises:
            ValueError: the plan was read from a file and no model is given, the model is of another structure, or
                `logits` or `tiles` is not what `convert` takes.
        """
        model = self._target(model)
        if self.whole == NONE:
            self._check(model)
            if logits is not None or tiles != 1:
                return convert(model, recompute="output", logits=logits, tiles=tiles)
            revert(model)
            return Report(NONE, "torch", [], [])
        return convert(model, recompute=self, logits=logits, tiles=tiles)

    def revert(self, model: nn.Module | None = None) -> None:
        """Restore the modules' own forward; see `ckpt_kernels.revert`."""
        revert(self._target(model))

    def _target(self, model: nn.Module | None) -> nn.Module:
        if model is None:
            model = self._model()
        if model is None:
            raise ValueError("no model is given, and the one that the plan was made for is not there; expected a model")
        return model

    def levels_in(self, model: nn.Module) -> Mapping[str, tuple[str, tuple[Place, ...]]]:
        """Return for `convert` the level of each layer, and the layer's place in each checkpointed run around it."""
        self._check(model)
        levels: dict[str, tuple[str, tuple[Place, ...]]] = {}
        self._place(self.assignment, (), levels, itertools.count(1))
        return levels

    def _place(
        self,
        parts: Assignment,
        runs: tuple[tuple[int, Checkpoint], ...],
        levels: dict[str, tuple[str, tuple[Place, ...]]],
        keys: "itertools.count[int]",
    ) -> None:
        """Add the layers of `parts` to `levels`; `runs` are the checkpoints around these parts, with unique keys."""
        for part in parts:
            if isinstance(part, Checkpoint):
                self._place(part.inside, (*runs, (next(keys), part)), levels, keys)
            elif part.level != FIXED:
                places = (Place(key, part.stage - run.first, part.stage == run.last) for key, run in runs)
                levels[self.layers[part.stage]] = part.level, tuple(places)

    def _check(self, model: nn.Module) -> None:
        if any(map(is_sharded, modules_of(model))):
            raise ValueError("the model is sharded; expected a model that is not: apply the plan, then shard")
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            raise ValueError(
                f"the model is wrapped in {type(model).__name__}; expected the model inside, model.module: apply the "
                "plan, then wrap"
            )
        if structure_of(model) != self.structure:
            raise ValueError(
                "the model is of another structure (names, classes and shapes of its modules) than the one that the "
                "plan was made for; expected the same, or a new plan"
            )

    def predict(self, /, *inputs: Any, **kwargs: Any) -> StepCost:
        """Estimate the cost of a step at another batch or length from shapes alone; no step is run.

        The estimate scales the measured bytes and seconds by the number of elements of the first tensor. Costs that do
        not grow with the batch (a weight's gradient before accumulation) are overestimated, and costs that grow faster
        (attention that materializes its scores) are underestimated. Only a plan made for these inputs is sure to fit.

        Args:
            inputs, kwargs: the arguments of the model.

        Raises:
            ValueError: there is no tensor, or the first one has another number of dimensions than the plan's.

        Example:
            >>> layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
            >>> model = torch.nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
            >>> plan = ckpt_kernels.plan(model, torch.randn(2, 64, 32), budget=0.6)
            >>> plan.predict(torch.randn(4, 64, 32)).peak == 2 * plan.measured.peak
            True
        """
        shape = first_shape(inputs, kwargs)
        if not shape or len(shape) != len(self.given):
            raise ValueError(f"the first tensor is of shape {shape}; expected as many dimensions as {self.given} has")
        ratio = math.prod(shape) / max(math.prod(self.given), 1)
        return StepCost(math.ceil(self.measured.peak * ratio), self.measured.seconds * ratio)

    def save(self, path: str | pathlib.Path) -> None:
        """Write the plan as JSON."""
        pathlib.Path(path).write_text(json.dumps(self.as_dict(), indent=1))

    @staticmethod
    def load(path: str | pathlib.Path) -> "Plan":
        """Read a plan from a file that `save` wrote.

        Raises:
            ValueError: the file holds no plan.
        """
        try:
            plan = _from_dict(json.loads(pathlib.Path(path).read_text()))
            predicted(plan.stages, plan.assignment)
            _check_parts(plan)
            str(plan)
            return plan
        except KeyError as error:
            raise ValueError(f"{path} holds no plan: it has no {error}; {_EXPECTED}") from error
        except (IndexError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} holds no plan: {error}; {_EXPECTED}") from error

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as data for JSON."""
        data = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return data | {
            "assignment": [_part_to_json(part) for part in self.assignment],
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
        """The level of each layer by name; "checkpoint, output" is a layer at "output" inside a checkpoint."""
        levels = {}
        for part in self.assignment:
            for choice in stages_of((part,)):
                if choice.level != FIXED:
                    prefix = "checkpoint, " if isinstance(part, Checkpoint) else ""
                    levels[self.layers[choice.stage]] = prefix + choice.level
        return levels

    def __str__(self) -> str:
        return report.text(self)

    def draw(self, path: str | pathlib.Path) -> None:
        """Draw time against peak memory of the frontier, the plan, and all layers at one choice. Needs matplotlib."""
        report.draw(self, path)


# The version of the file format.
_VERSION = 2
_EXPECTED = "expected a file that Plan.save wrote"


def structure_of(model: nn.Module) -> str:
    """Return a digest of the names, classes and shapes of a model's modules and parameters.

    A converted model has the same digest as the original. A scripted or traced module counts without its class and the
    modules inside, which a copy may lack.
    """
    digest = hashlib.sha256()
    scripted: set[str] = set()
    for name, module in named_modules(model):
        if isinstance(module, torch.jit.ScriptModule):
            scripted.add(name)
            continue
        if not scripted.isdisjoint(itertools.accumulate(name.split("."), "{}.{}".format)):
            continue
        shapes = [(key, tuple(p.shape)) for key, p in module._parameters.items() if p is not None]
        digest.update(repr((name, original_of(module).__qualname__, shapes)).encode())
    return digest.hexdigest()


def _check_parts(plan: Plan) -> None:
    """Raise ValueError for an invalid budget, and for choices that do not match the stages one by one."""
    if plan.budget is not None and not is_count(plan.budget):
        raise ValueError(f"its budget is {plan.budget!r}")
    chosen = stages_of(plan.assignment)
    if [choice.stage for choice in chosen] != list(range(len(plan.stages) if plan.whole is None else 0)):
        raise ValueError("its choices are not one for each stage")
    if len(plan.layers) != len(plan.stages):
        raise ValueError(f"it has {len(plan.layers)} names for {len(plan.stages)} stages")
    named = [name for name in plan.layers if name]
    if len(set(named)) != len(named):
        raise ValueError("two of its stages have the same name")
    for name, step in {"measured": plan.measured, **plan.steps}.items():
        if not all(value >= 0 for value in asdict(step).values()):
            raise ValueError(f"the step {name!r} is {step}")
    levels = {choice.level for choice in chosen} | ({plan.whole} if plan.whole is not None else set())
    for level in levels - {FIXED}:
        Policy.of(level, OF_LAYERS, "a level in it")


def _part_to_json(part: StageAt | Checkpoint) -> Any:
    if isinstance(part, StageAt):
        return [part.stage, part.level]
    return {"run": [_part_to_json(inner) for inner in part.inside]}


def _part_from_json(data: Any) -> StageAt | Checkpoint:
    return Checkpoint(tuple(map(_part_from_json, data["run"]))) if isinstance(data, dict) else StageAt(*data)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _from_dict(data: dict[str, Any]) -> Plan:
    if data["version"] != _VERSION:
        raise ValueError(f"it is of version {data['version']!r}, not {_VERSION}")
    names = ("budget", "bound", "layers", "structure", "whole", "note", "count")
    return Plan(
        **{name: data[name] for name in names},
        assignment=tuple(map(_part_from_json, data["assignment"])),
        predicted=StepCost(**data["predicted"]),
        measured=StepCost(**data["measured"]),
        steps={name: StepCost(**step) for name, step in data["steps"].items()},
        stages=[Stage.from_dict(stage) for stage in data["stages"]],
        frontier=[(int(need), float(seconds)) for need, seconds in data["frontier"]],
        shapes={name: _tuples(shapes) for name, shapes in data["shapes"].items()},
        given=tuple(data["given"]),
    )
