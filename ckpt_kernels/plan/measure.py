"""The costs of each choice, measured in steps of the user's own model and batch.

The steps run on twins that share the model's parameters' memory and nothing else: the model, its gradients and all
random numbers stay as they are. Gradients are there before a step, as while they are accumulated, so that what is
measured is bytes beside them.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..check import _described, _different
from ..convert import convert, revert
from ..convert.loads import modules_of
from ..convert.swap import surround
from ..copies import copied, twin_of
from ..memory import _random_numbers_kept
from ..runs import Place
from ..target import tensors_in
from .costs import FIXED, Checkpointed, Cost, Stage
from .layers import layers_of
from .marks import NotAChain, Point, Recorder, Segment, Where, marking, peak_of, segments

Loss = Callable[[Any], Tensor]
LEVELS = ("none", "block", "output", "all", "layer")
CHECKPOINT = "checkpoint"
CHOICES = (*LEVELS, CHECKPOINT)
EAGER = "eager"
# Of layers of which so many are alike, each choice is timed in that many at once.
MANY = 4


@dataclass(frozen=True)
class Step:
    """A whole step as it was measured: the peak in bytes, and seconds."""

    peak: int
    seconds: float


@dataclass(frozen=True)
class Measured:
    """What was found out about a model.

    Attributes:
        stages: the chain.
        layers: for each stage the name of its module; "" for code between layers.
        steps: whole steps, with all layers at one choice, by choice; "eager" is the model as it is.
        shapes: of what each layer was called with.
    """

    stages: list[Stage]
    layers: list[str]
    steps: dict[str, Step]
    shapes: dict[str, tuple]


class ByLayer:
    """A choice for each layer, as `convert` takes it."""

    def __init__(self, choices: Mapping[str, str]) -> None:
        self.choices = choices

    def levels_in(self, model: nn.Module) -> Mapping[str, tuple[str, tuple[Place, ...]]]:
        return {
            name: ("output", (Place(key, 0, True),)) if choice == CHECKPOINT else (choice, ())
            for key, (name, choice) in enumerate(self.choices.items())
        }


class Bench:
    """Runs steps of twins of a model.

    Args:
        model: a module.
        args, kwargs: what the model is called with.
        loss: the loss of what the model returns; None is the output's `loss`, or the sum of all its tensors.
        progress: called with a line before each step.
    """

    def __init__(
        self,
        model: nn.Module,
        args: tuple,
        kwargs: dict[str, Any],
        loss: Loss | None,
        progress: Callable[[str], None],
    ) -> None:
        self.model = model
        self._inputs = args, kwargs
        self._loss = loss or default_loss
        self._progress = progress
        self._gradients: dict[int, Tensor] = {}
        self.count = 0
        converted = twin_of(model)
        convert(converted, recompute="block")
        self.names = list(layers_of(converted))
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def twin(self, recompute: Any) -> nn.Module:
        """A twin of the model whose layers are marked; converted, if not None."""
        twin = twin_of(self.model)
        if recompute is None:
            revert(twin)
        else:
            convert(twin, recompute=recompute)
        for mine, its in zip(self.model.parameters(), twin.parameters(), strict=True):
            if its.requires_grad:
                if id(mine) not in self._gradients:
                    self._gradients[id(mine)] = torch.zeros_like(its)
                its.grad = self._gradients[id(mine)]
        modules = dict(twin.named_modules())
        for name in self.names:
            surround(modules[name], marking)
        return twin

    def step(self, what: str, twin: nn.Module, memory: bool) -> tuple[Recorder, list[Point]]:
        """One step, with its memory recorded, or its times."""
        self._progress(what)
        self.count += 1
        modules = dict(twin.named_modules())
        layers = {modules[name]: index for index, name in enumerate(self.names)}
        recorder = Recorder(layers, self.device, memory)
        for gradient in self._gradients.values():
            gradient.zero_()
        memo: dict[int, Any] = {}
        args, kwargs = copied(self._inputs, memo)

        def step(recorder: Recorder) -> None:
            output = twin(*args, **kwargs)
            loss = self._loss(output)
            recorder.mark("loss")
            recorder.is_backward = True
            loss.backward()

        with _random_numbers_kept(), torch.inference_mode(False), torch.enable_grad():
            return recorder, recorder.run(step)


def default_loss(output: Any) -> Tensor:
    """The output's own loss, if it has one, or the sum of all tensors in it that have a gradient.

    Raises:
        ValueError: there is none.
    """
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(own, Tensor) and own.requires_grad:
        return own
    tensors = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
    if not tensors:
        raise ValueError(f"the model returns {type(output).__name__} without a gradient; expected a loss to be given")
    total = tensors[0].sum()
    for tensor in tensors[1:]:
        total = total + tensor.sum()
    return total


def measured(bench: Bench) -> Measured:
    """Measures each choice with all layers at it.

    Raises:
        NotAChain: the layers are not called one after the other.
    """
    if not bench.names:
        raise NotAChain("it has no layers: no ModuleList or Sequential whose members can be given levels of their own")
    twins, recorders, memory, peaks = {}, {}, {}, {}
    for choice in (EAGER, *CHOICES[1:]):
        twin = bench.twin(None if choice == EAGER else ByLayer(dict.fromkeys(bench.names, choice)))
        before = _attributes(twin, bench.names) if choice == EAGER else {}
        recorders[choice], points = bench.step(f"memory of {choice}", twin, memory=True)
        if choice == EAGER:
            changed = _changed(before, _attributes(twin, bench.names))
        memory[choice], peaks[choice] = segments(points), peak_of(points)
    order = [bench.names[layer] for layer in recorders[EAGER].outputs]
    for choice, recorder in recorders.items():
        if [bench.names[layer] for layer in recorder.outputs] != order:
            raise NotAChain("layers are called in another order from step to step")
    memory["none"] = memory.pop(EAGER)
    kinds = _kinds(bench, recorders[EAGER], order)
    seconds = _seconds(bench, order, kinds)
    builder = _Stages(bench, recorders[EAGER], order, memory, seconds, changed)
    stages, layers = builder.stages()
    shapes = {name: recorders[EAGER].shapes[bench.names.index(name)] for name in order}
    steps = {choice: Step(peak, seconds.of_step(choice)) for choice, peak in peaks.items()}
    return Measured(stages, layers, steps, shapes)


def _seconds(bench: Bench, order: list[str], kinds: list[int]) -> "Seconds":
    """The seconds of all choices. In each step the choices of layers in a row are different, and over as many steps as
    there are choices each layer has each: so a machine that is slower for a while is so for all choices."""
    rounds = 1 if len(set(kinds)) * MANY <= len(kinds) else 3
    chosen, found = [], []
    turns = len(CHOICES)
    twins: dict[int, nn.Module] = {}
    for step in range(rounds * turns):
        turn = step % turns
        choices = {name: CHOICES[(place + turn) % turns] for place, name in enumerate(order)}
        if turn not in twins:
            twins[turn] = bench.twin(ByLayer(choices))
        _, points = bench.step(f"times, {step + 1} of {rounds * turns}", twins[turn], memory=False)
        chosen.append(list(choices.values()))
        found.append(segments(points))
    return Seconds.fitted(found, chosen, kinds)


def _attributes(twin: nn.Module, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What Python code may have written to, by layer: attributes, but no parameters and buffers."""
    modules = dict(twin.named_modules())
    return {
        name: {
            f"{index}.{key}": _described(value)
            for index, module in enumerate(modules_of(modules[name]))
            for key, value in vars(module).items()
            if not key.startswith("_")
        }
        for name in names
    }


def _changed(before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> set[str]:
    """The layers that write to their own attributes as they run, which must not happen twice."""
    return {name for name in before if _different(before[name], after[name])}


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
        choice = "none" if choice == EAGER else choice
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
    ) -> None:
        self._bench = bench
        self._recorder = recorder
        self._order = order
        self._memory = memory
        self._seconds = seconds
        self._changed = changed

    def stages(self) -> tuple[list[Stage], list[str]]:
        """The chain, and for each stage the layer's name."""
        found: list[tuple[Stage, str]] = []
        follows = False
        for index in range(len(self._order)):
            gap = self._gap(index)
            if gap is not None:
                found.append((gap, ""))
            layer = self._layer(index)
            follows = self._recorder.follows[self._bench.names.index(self._order[index])] and gap is None and bool(found)
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
        costs = [self._cost(choice, "gap", index) for choice in self._memory if choice != "none"]
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
        found = {level: self._cost(level, "layer", index) for level in LEVELS}
        checkpoint, left = self._cost(CHECKPOINT, "layer", index)
        costs = {level: cost for level, (cost, _) in found.items()}
        output = self._recorder.outputs[self._bench.names.index(name)]
        inside = costs["output"]
        checkpointed = None
        if name not in self._changed and checkpoint.kept < inside.kept:
            # A forward pass of which nothing is kept does what the other does, and a second one ends early, but not at
            # half: what is measured beyond that is noise.
            forward = max(checkpoint.forward, 0.9 * min(cost.forward for cost in costs.values()))
            saved = min(max(inside.seconds - checkpoint.backward, 0.0), inside.forward / 2)
            checkpointed = Checkpointed(max(checkpoint.kept - output, 0), checkpoint.forward_peak, forward, saved)
        left = max(left, *(left for _, left in found.values()))
        kind = type(dict(self._bench.model.named_modules())[name]).__name__
        return Stage(name, kind, output, left, _worth_having(costs), checkpointed)


def _worth_having(costs: dict[str, Cost]) -> dict[str, Cost]:
    """Without choices that another beats in all."""

    def beats(one: str, other: str) -> bool:
        a, b = costs[one], costs[other]
        no_worse = all(getattr(a, name) <= getattr(b, name) for name in ("kept", "forward_peak", "backward_peak", "seconds"))
        return no_worse and (a != b or LEVELS.index(one) < LEVELS.index(other))

    return {name: cost for name, cost in costs.items() if not any(beats(o, name) for o in costs if o != name)}


