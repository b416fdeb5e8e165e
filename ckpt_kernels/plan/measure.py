"""The costs of each choice, measured in steps of the user's own model and batch."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import nn

from ..convert.loads import modules_of
from ..levels import CHECKPOINT, NONE, OF_LAYERS, OF_MODULES, WITHIN_CHECKPOINT
from ..model_state import described, different
from ..watching import watched
from .bench import EAGER, Bench, ByLayer, InRuns, StepCost, is_out_of_memory
from .costs import FIXED, Checkpointed, Cost, Stage
from .marks import NotAChain, Recorder, Segment, Where, peak_of, segments
from .timing import Seconds, seconds_of


@dataclass(frozen=True)
class Measured:
    """What was found out about a model.

    Attributes:
        stages: the chain.
        layers: for each stage the name of its module; "" for code between layers.
        steps: whole steps, with all layers at one choice, by choice; "eager" is the model as it is.
        shapes: of what each layer was called with.
        notes: choices that were left out, and why.
    """

    stages: list[Stage]
    layers: list[str]
    steps: dict[str, StepCost]
    shapes: dict[str, tuple]
    notes: list[str]


def measured(bench: Bench) -> Measured:
    """Measures each choice with all layers at it.

    Raises:
        NotAChain: the layers are not called one after the other.
    """
    if not bench.names:
        raise NotAChain(
            "the model has no layers: no ModuleList or Sequential whose members can be given levels of their own"
        )
    recorders: dict[str, Recorder] = {}
    memory: dict[str, dict[Where, Segment]] = {}
    peaks: dict[str, int] = {}
    notes: list[str] = []
    changed: set[str] = set()
    twice = _Twice(set(), set())
    for choice in OF_MODULES:
        twin = bench.twin(None if choice == NONE else ByLayer(dict.fromkeys(bench.names, choice)))
        before = {} if recorders else _attributes(twin, bench.names)
        try:
            recorders[choice], points = bench.step(f"memory of {called(choice)}", twin, memory=True)
            if choice == CHECKPOINT:
                called_in = [bench.names[layer] for layer in recorders[choice].outputs]
                twice = _run_twice(bench, twin, called_in)
        except NotAChain:
            raise
        except Exception as error:
            # As it is the model has to run; at a choice that its own code refuses it is left out.
            if choice == NONE and not is_out_of_memory(error):
                raise
            notes.append(f"{called(choice)} is left out: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
            continue
        if before:
            changed = _changed(before, _attributes(twin, bench.names))
        memory[choice], peaks[choice] = segments(points), peak_of(points)
    if not recorders.keys() - {CHECKPOINT}:
        raise MemoryError(
            "a step does not fit at any choice but, maybe, a checkpoint of each layer: " + "; ".join(notes)
        )
    first, *others = recorders.values()
    if not first.outputs:
        raise NotAChain("none of the model's layers is called where gradients are recorded")
    order = [bench.names[layer] for layer in first.outputs]
    if any([bench.names[layer] for layer in recorder.outputs] != order for recorder in others):
        raise NotAChain("layers are called in another order from step to step")
    kinds = _kinds(bench, first, order)
    seconds = seconds_of(bench, order, kinds, list(memory))
    stages, layers = _Stages(bench, first, order, memory, seconds, changed | twice.alone, twice.in_runs).stages()
    shapes = {name: first.shapes[bench.names.index(name)] for name in order}
    steps = {called(choice): StepCost(peak, seconds.of_step(choice)) for choice, peak in peaks.items()}
    return Measured(stages, layers, steps, shapes, notes)


def called(choice: str) -> str:
    """The name of a whole step with all layers at a choice."""
    return EAGER if choice == NONE else choice


class _Twice(NamedTuple):
    """The layers that did not save the same, bit by bit, when they ran again: by themselves, and with others in one
    checkpoint, where those behind one that differs do too."""

    alone: set[str]
    in_runs: set[str]


def _run_twice(bench: Bench, twin: nn.Module, order: list[str]) -> _Twice:
    """One step tells that no layer differs; else another tells which do by themselves."""
    in_runs = _differing(bench, bench.twin(InRuns(order)), "what runs twice")
    return _Twice(_differing(bench, twin, "what runs twice by itself") if in_runs else set(), in_runs)


def _differing(bench: Bench, twin: nn.Module, what: str) -> set[str]:
    with watched() as differing:
        bench.step(what, twin, memory=False)
    return {name for name, module in twin.named_modules() if module in differing}


# What every module has for torch itself.
_TORCHS = frozenset(vars(nn.Module()))


def _attributes(twin: nn.Module, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What Python code may have written to, by layer: attributes, and which buffers there are; not what is in these."""
    modules = dict(twin.named_modules())
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        found[name] = {}
        for index, module in enumerate(modules_of(modules[name])):
            own = {key: described(value) for key, value in vars(module).items() if key not in _TORCHS}
            own |= {f"buffer {key}": id(buffer) for key, buffer in module._buffers.items()}
            found[name] |= {f"{index}.{key}": value for key, value in own.items()}
    return found


def _changed(before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> set[str]:
    """The layers that write to their own attributes as they run, which must not happen twice."""
    return {name for name in before if different(before[name], after[name])}


def _kinds(bench: Bench, recorder: Recorder, order: list[str]) -> list[int]:
    """For each layer in the order of calls the number of its kind: of equal structure and arguments."""
    modules = dict(bench.model.named_modules())
    kinds: dict[Any, int] = {}
    found = []
    for name in order:
        structure = tuple(
            (type(m).__qualname__, m.training, n, p.shape, p.dtype, p.requires_grad)
            for m in modules_of(modules[name])
            for n, p in m._parameters.items()
            if p is not None
        )
        key = structure, recorder.shapes[bench.names.index(name)]
        found.append(kinds.setdefault(key, len(kinds)))
    return found


class _Stages:
    """Makes stages of what was measured."""

    def __init__(
        self,
        bench: Bench,
        recorder: Recorder,
        order: list[str],
        memory: dict[str, dict[Where, Segment]],
        seconds: Seconds,
        changed: set[str],
        differing_in_runs: set[str],
    ) -> None:
        self._bench = bench
        self._recorder = recorder
        self._order = order
        self._memory = memory
        self._seconds = seconds
        self._changed = changed
        self._differing_in_runs = differing_in_runs

    def stages(self) -> tuple[list[Stage], list[str]]:
        """The chain, and for each stage the layer's name."""
        found: list[tuple[Stage, str]] = []
        follows = False
        for index in range(len(self._order)):
            gap = self._gap(index)
            if gap is not None:
                found.append((gap, ""))
            layer = self._layer(index)
            follows = self._recorder.follows[self._bench.names.index(layer.name)] and gap is None and bool(found)
            follows = follows and layer.name not in self._differing_in_runs
            found.append((replace(layer, follows=follows), layer.name))
        last = self._gap(len(self._order))
        if last is not None:
            found.append((last, ""))
        kinds: dict[tuple, int] = {}
        stages = []
        for stage, _ in found:
            own = (stage.kind, stage.output, stage.left, *stage.costs.items(), stage.checkpointed)
            stages.append(replace(stage, alike=kinds.setdefault(own, len(kinds))))
        return stages, [name for _, name in found]

    def _cost(self, choice: str, what: str, index: int) -> tuple[Cost, int]:
        """The cost, and what both passes leave."""
        suffix = "" if what == "layer" else "_gap"
        forward, backward = (self._memory[choice][f"{name}{suffix}", index] for name in ("forward", "backward"))
        times = [self._seconds.of((f"{name}{suffix}", index), choice) for name in ("forward", "backward")]
        return Cost(forward.net, forward.peak, backward.peak, *times), forward.net + backward.net

    def _gap(self, index: int) -> Stage | None:
        """The code before a layer, or after the last; None where there is nothing to speak of."""
        converted = [choice for choice in self._memory if choice != NONE] or list(self._memory)
        costs = [self._cost(choice, "gap", index) for choice in converted]
        most = Cost(
            max(cost.kept for cost, _ in costs),
            max(cost.forward_peak for cost, _ in costs),
            max(cost.backward_peak for cost, _ in costs),
            statistics.median(cost.forward for cost, _ in costs),
            statistics.median(cost.backward for cost, _ in costs),
        )
        left = max(left for _, left in costs)
        is_last = index == len(self._order)
        if not is_last and not (most.kept or most.forward_peak or most.backward_peak or left):
            return None
        name = "after the last layer" if is_last else f"before {self._order[index]}"
        return Stage(name, "", max(most.kept, 0), left, {FIXED: most})

    def _layer(self, index: int) -> Stage:
        name = self._order[index]
        found = {level: self._cost(level, "layer", index) for level in self._memory if level != CHECKPOINT}
        left = max(left for _, left in found.values())
        costs = {level: cost for level, (cost, _) in found.items()}
        output = self._recorder.outputs[self._bench.names.index(name)]
        checkpointed = None
        if CHECKPOINT in self._memory and name not in self._changed:
            checkpointed = self._checkpointed(index, costs, output)
            left = max(left, self._cost(CHECKPOINT, "layer", index)[1])
        kind = type(dict(self._bench.model.named_modules())[name]).__name__
        return Stage(name, kind, output, left, _worth_having(costs), checkpointed)

    def _checkpointed(self, index: int, costs: dict[str, Cost], output: int) -> Checkpointed | None:
        checkpoint, _ = self._cost(CHECKPOINT, "layer", index)
        # What is inside it in the steps that are measured; where that does not fit by itself, the nearest that does.
        inside = costs.get(WITHIN_CHECKPOINT) or min(costs.values(), key=lambda cost: cost.kept)
        if checkpoint.kept >= inside.kept:
            return None
        # A forward pass of which nothing is kept does what the other does, and a second one ends early, but not at
        # half: what is measured beyond that is noise.
        forward = max(checkpoint.forward, 0.9 * min(cost.forward for cost in costs.values()))
        saved = min(max(inside.seconds - checkpoint.backward, 0.0), inside.forward / 2)
        return Checkpointed(max(checkpoint.kept - output, 0), checkpoint.forward_peak, forward, saved)


def _worth_having(costs: dict[str, Cost]) -> dict[str, Cost]:
    """Without choices that another beats in all."""

    def beats(one: str, other: str) -> bool:
        a, b = costs[one], costs[other]
        no_worse = all(
            getattr(a, name) <= getattr(b, name) for name in ("kept", "forward_peak", "backward_peak", "seconds")
        )
        return no_worse and (a != b or OF_LAYERS.index(one) < OF_LAYERS.index(other))

    return {name: cost for name, cost in costs.items() if not any(beats(o, name) for o in costs if o != name)}
