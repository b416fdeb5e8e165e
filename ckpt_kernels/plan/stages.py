"""Stages of a chain, made of what was measured of layers and of the code between them."""

import statistics
from dataclasses import replace

from ..levels import CHECKPOINT, NONE, OF_MODULES, Policy
from .bench import Bench
from .costs import FIXED, Checkpointed, Cost, Stage
from .timing import Seconds
from .trials import Trials, tiles_in


class Stages:
    """Makes stages of what was measured.

    Args:
        bench: whose steps they were.
        order: the layers' names, in the order of their calls.
        trials: the memory of each choice.
        seconds: the time of each choice.
    """

    def __init__(self, bench: Bench, order: list[str], trials: Trials, seconds: Seconds) -> None:
        self._bench = bench
        self._order = order
        self._trials = trials
        self._recorder = next(iter(trials.recorders.values()))
        self._memory = trials.memory
        self._seconds = seconds

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
            follows = follows and layer.name not in self._trials.in_runs
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
        seconds, again = (self._seconds.of((f"{name}{suffix}", index), choice) for name in ("forward", "backward"))
        return Cost(forward.net, forward.peak, backward.peak, seconds, again), forward.net + backward.net

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
        offered = self._offered(index)
        found = {level: self._cost(level, "layer", index) for level in offered}
        left = max(left for _, left in found.values())
        costs = {level: cost for level, (cost, _) in found.items()}
        output = self._recorder.outputs[self._bench.names.index(name)]
        checkpointed = None
        checkpoint = self._checkpoint(offered)
        if checkpoint in self._memory and name not in self._trials.alone:
            within = tiles_in(checkpoint)
            costs = {level: replace(c, may_be_inside=tiles_in(level) == within) for level, c in costs.items()}
            checkpointed = self._checkpointed(checkpoint, index, costs, output)
            left = max(left, self._cost(checkpoint, "layer", index)[1])
        kind = type(dict(self._bench.model.named_modules())[name]).__name__
        return Stage(name, kind, output, left, _worth_having(costs), checkpointed)

    def _offered(self, index: int) -> list[str]:
        """The choices of a layer but its checkpoint; in more tiles only where they lower a peak of this layer."""
        found: list[str] = []
        last: dict[str, str] = {}
        for choice in self._memory:
            policy = Policy.of(choice, OF_MODULES, "choice")
            before = last.get(policy.level)
            is_lower = before is None or self._trials.of(choice, index).is_lower_than(self._trials.of(before, index))
            if is_lower and not policy.is_checkpoint:
                found.append(choice)
                last[policy.level] = choice
        return found

    def _checkpoint(self, offered: list[str]) -> str:
        """The checkpoint of a layer: in the most tiles that it is offered."""
        tiles = max(map(tiles_in, offered))
        inmost = str(Policy(CHECKPOINT, tiles))
        return inmost if inmost in self._memory else CHECKPOINT

    def _checkpointed(self, choice: str, index: int, costs: dict[str, Cost], output: int) -> Checkpointed | None:
        checkpoint, _ = self._cost(choice, "layer", index)
        # What is inside it in the steps that are measured; where that does not fit by itself, the nearest that does.
        within = str(Policy.of(choice, OF_MODULES, "choice").inside())
        costs = {level: cost for level, cost in costs.items() if cost.may_be_inside}
        inside = costs.get(within) or min(costs.values(), key=lambda cost: cost.kept)
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
        no_worse = a.may_be_inside >= b.may_be_inside and all(
            getattr(a, name) <= getattr(b, name) for name in ("kept", "forward_peak", "backward_peak", "seconds")
        )
        return no_worse and (a != b or order.index(one) < order.index(other))

    order = list(costs)

    return {name: cost for name, cost in costs.items() if not any(beats(o, name) for o in costs if o != name)}
