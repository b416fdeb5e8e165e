"""Measures the cost of each choice in steps of the user's own model and batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .. import offload as offloading
from ..convert.module_tree import modules_of
from ..levels import CHECKPOINT, NONE
from ..memory.table import size
from .bench import LONE_CHECKPOINT, PLAIN_CHECKPOINT, Bench, StepCost
from .costs import Stage
from .marks import NotAChain, Recorder
from .stages import Stages
from .timing import offers_one_more, seconds_of
from .trials import Trials, step_name

_NOT_PLAIN = "layers receive a {}, and are not checkpointed with it (use_cache=False in transformers passes no cache)"


@dataclass(frozen=True)
class Measurements:
    """The measured costs of a model.

    Attributes:
        stages: the chain.
        layers: the module name of each stage; "" for code between layers.
        steps: for each choice the cost of a step with all layers at that choice; "eager" is the model as it is.
        shapes: shapes and dtypes of the tensors that each layer was called with.
        notes: choices that were skipped, and why.
    """

    stages: list[Stage]
    layers: list[str]
    steps: dict[str, StepCost]
    shapes: dict[str, tuple]
    notes: list[str]


def measure_choices(bench: Bench, tiles: Sequence[int] | None = None, offload: bool = False) -> Measurements:
    """Measure each choice in a step with all layers at that choice; for `tiles` and `offload` see `plan`.

    Raises:
        NotAChain: the layers are not called one after the other.
    """
    if not bench.names:
        raise NotAChain(
            "the model has no layers: no ModuleList or Sequential whose members can be given levels of their own"
        )
    trials = Trials(bench)
    trials.run(tiles, offload)
    if not trials.recorders.keys() - {CHECKPOINT}:
        raise MemoryError(
            "a step does not fit at any choice but, maybe, a checkpoint of each layer: " + "; ".join(trials.notes)
        )
    first, *others = trials.recorders.values()
    if not first.outputs:
        raise NotAChain("none of the model's layers is called where gradients are recorded")
    order = [bench.names[layer] for layer in first.outputs]
    if any(recorder.outputs.keys() != first.outputs.keys() for recorder in others):
        raise NotAChain("at some levels several of the model's layers are computed as one")
    if any([bench.names[layer] for layer in recorder.outputs] != order for recorder in others):
        raise NotAChain("layers are called in another order from step to step")
    kinds = _kinds(bench, first, order)
    timed = list(trials.memory)
    if {NONE, CHECKPOINT} <= trials.memory.keys():
        timed.append(PLAIN_CHECKPOINT)
        if offers_one_more(kinds, len(timed)):
            timed.append(LONE_CHECKPOINT)
    seconds = seconds_of(bench, order, kinds, timed)
    stages, layers = Stages(bench, order, trials, seconds).stages()
    shapes = {name: first.shapes[bench.names.index(name)] for name in order}
    steps = {step_name(choice): StepCost(peak, seconds.of_step(choice)) for choice, peak in trials.peaks.items()}
    notes = _notes_of_offload(stages, bench.device.type) if offload else []
    notes += [*trials.notes, *map(_NOT_PLAIN.format, sorted(kind.__name__ for kind in first.not_plain))]
    return Measurements(stages, layers, steps, shapes, notes)


def _notes_of_offload(stages: list[Stage], device: str) -> list[str]:
    if not any(cost.offloaded for stage in stages for cost in stage.costs.values()):
        return [f"no layer keeps a tensor of {size(offloading.LEAST)} or more, so none is offloaded"]
    return ["offload is simulated on a CPU: peaks are those of a device"] if device == "cpu" else []


def _kinds(bench: Bench, recorder: Recorder, order: list[str]) -> list[int]:
    """Number the kinds of layers; layers of one kind have equal structure and arguments of equal shapes."""
    modules = dict(bench.model.named_modules())
    kinds: dict[Any, int] = {}
    numbers = []
    for name in order:
        structure = tuple(
            (type(m).__qualname__, m.training, n, p.shape, p.dtype, p.requires_grad)
            for m in modules_of(modules[name])
            for n, p in m._parameters.items()
            if p is not None
        )
        key = structure, recorder.shapes[bench.names.index(name)]
        numbers.append(kinds.setdefault(key, len(kinds)))
    return numbers
