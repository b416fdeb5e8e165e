"""Builds the stages of a chain from the measured costs of layers and of the code between layers."""

import statistics
from dataclasses import replace
from typing import NamedTuple

from ..host_memory import seconds_per_byte
from ..levels import CHECKPOINT, NONE, OF_MODULES, Policy
from .bench import PLAIN_CHECKPOINT, Bench, level_inside
from .costs import FIXED, Checkpointed, Cost, Stage
from .offloading import is_offloaded, offloaded_cost
from .timing import Seconds
from .trials import Trials, tiles_in


class Stages:
    """Builds stages from measurements.

    Args:
        bench: the bench that ran the steps.
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
        self._not_offloaded = [choice for choice in self._memory if not is_offloaded(choice)]
        is_on_device = len(self._not_offloaded) == len(self._memory)
        self._seconds_per_byte = 0.0 if is_on_device else seconds_per_byte(bench.device)

    def stages(self) -> tuple[list[Stage], list[str]]:
        """Return the chain, and for each stage the layer's name."""
        chain: list[tuple[Stage, str]] = []
        follows = False
        for index in range(len(self._order)):
            gap = self._gap(index)
            if gap is not None:
                chain.append((gap, ""))
            layer = self._layer(index)
            follows = self._recorder.follows[self._bench.names.index(layer.name)] and gap is None and bool(chain)
            follows = follows and layer.name not in self._trials.not_repeatable_in_runs
            chain.append((replace(layer, follows=follows), layer.name))
        last = self._gap(len(self._order))
        if last is not None:
            chain.append((last, ""))
        kinds: dict[tuple, int] = {}
        stages = []
        for stage, _ in chain:
            own = (stage.kind, stage.output, stage.left, *stage.costs.items(), stage.checkpointed)
            stages.append(replace(stage, alike=kinds.setdefault(own, len(kinds))))
        return stages, [name for _, name in chain]

    def _cost(self, choice: str, index: int, suffix: str = "") -> tuple[Cost, int]:
        """Return the cost of the i-th layer, or with suffix "_gap" of the code before that layer, and `Stage.left`."""
        positions = (f"forward{suffix}", index), (f"backward{suffix}", index)
        forward, backward = (self._memory[choice][position] for position in positions)
        forward_seconds, backward_seconds = (self._seconds.of(position, choice) for position in positions)
        cost = Cost(forward.net, forward.peak, backward.peak, forward_seconds, backward_seconds)
        return cost, forward.net + backward.net

    def _offloaded_cost(self, choice: str, index: int) -> tuple[Cost, int]:
        """Return the cost of the i-th layer at a choice that offloads, and `Stage.left`.

        The copies of adjacent layers share the bus, so a layer takes at least as long as the copy of the layer's bytes.
        """
        cost, _ = self._cost(choice, index)
        offloaded = self._trials.recorders[choice].offloaded
        moved = [offloaded[self._bench.names.index(name)] for name in self._order]
        # If nothing but offload fits, the step itself has to tell.
        gaps = (self._memory[other]["forward_gap", index + 1].net for other in self._not_offloaded or [choice])
        kept, backward_peak, left = offloaded_cost(self._memory[choice], moved, max(gaps), index)
        copy = moved[index] * self._seconds_per_byte
        cost = replace(cost, kept=kept, backward_peak=backward_peak, may_be_inside=False, offloaded=moved[index])
        return replace(cost, forward=max(cost.forward, copy), backward=max(cost.backward, copy)), left

    def _gap(self, index: int) -> Stage | None:
        """Return the code before a layer, or after the last; None if the code before a layer takes no memory."""
        converted = [choice for choice in self._not_offloaded if choice != NONE] or list(self._memory)
        costs = [self._cost(choice, index, "_gap") for choice in converted]
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
        """Return the stage of the i-th called layer."""
        name = self._order[index]
        offered = self._offered(index)
        measured = {level: self._cost(level, index) for level in offered}
        on_host = {c: self._offloaded_cost(c, index) for c in self._memory if is_offloaded(c)}
        on_host = {choice: (cost, left) for choice, (cost, left) in on_host.items() if cost.offloaded}
        # Where outputs are discarded, the backward pass of a layer may recompute inputs of layers before, and leave
        # them to these. Their bytes are counted already, in what the layers before keep.
        plain = {level: measured[level] for level in (NONE, "block") if level in measured}
        left = max(left for _, left in (plain or measured or on_host).values())
        costs = {level: cost for level, (cost, _) in measured.items()}
        output = self._recorder.outputs[self._bench.names.index(name)]
        checkpointed = None
        checkpoint = self._checkpoint(offered)
        if costs and checkpoint in self._memory and name not in self._trials.not_repeatable:
            within = tiles_in(checkpoint)
            costs = {level: replace(c, may_be_inside=tiles_in(level) == within) for level, c in costs.items()}
            costs, checkpointed = self._checkpointed(checkpoint, index, costs, output)
            left = max(left, self._cost(checkpoint, index)[1])
        kind = type(dict(self._bench.model.named_modules())[name]).__name__
        offloaded = _undominated({choice: cost for choice, (cost, _) in on_host.items()})
        return Stage(name, kind, output, left, _undominated(costs) | offloaded, checkpointed)

    def _offered(self, index: int) -> list[str]:
        """Return the choices of a layer except checkpoints and offload; more tiles only if they lower a peak of it."""
        offered: list[str] = []
        last: dict[str, str] = {}
        peaks = self._trials.layer_peaks
        for choice in self._not_offloaded:
            policy = Policy.of(choice, OF_MODULES, "choice")
            before = last.get(policy.level)
            is_lower = before is None or peaks(choice, index).is_lower_than(peaks(before, index))
            if is_lower and not policy.is_checkpoint:
                offered.append(choice)
                last[policy.level] = choice
        return offered

    def _checkpoint(self, offered: list[str]) -> str:
        """Return the checkpoint with the largest number of tiles among a layer's choices."""
        tiles = max(map(tiles_in, offered), default=1)
        tiled = str(Policy(CHECKPOINT, tiles))
        return tiled if tiled in self._memory else CHECKPOINT

    def _checkpointed(
        self, choice: str, index: int, costs: dict[str, Cost], output: int
    ) -> tuple[dict[str, Cost], Checkpointed | None]:
        """Return the costs of a layer that may be checkpointed, and the cost of the first forward pass.

        The latter is None if the checkpoint keeps no less.
        """
        checkpoint, _ = self._cost(choice, index)
        inside = {level: cost for level, cost in costs.items() if cost.may_be_inside}
        # If a step at the level inside ran out of memory, the level that keeps least stands in.
        within = level_inside(choice)
        within = within if within in inside else min(inside, key=lambda level: inside[level].kept)
        if checkpoint.kept >= inside[within].kept:
            return costs, None
        discarding = self._runs_twice(choice, index, inside[within])
        plain = discarding
        if NONE in inside and self._seconds.has(PLAIN_CHECKPOINT):
            plain = self._runs_twice(PLAIN_CHECKPOINT, index, inside[NONE])
        added = {}
        for level, cost in inside.items():
            # The first pass does the work of an ordinary one. Measurements below that are noise.
            beyond = plain.beyond if level in (NONE, "block") else discarding.beyond
            added[level] = cost.forward + max(beyond, -0.1 * cost.forward)
        least = min(added.values())
        costs = costs | {level: replace(inside[level], inside=more - least) for level, more in added.items()}
        kept = max(checkpoint.kept - output, 0)
        saved, begin = min(plain.saved, discarding.saved), self._seconds.begin(index)
        return costs, Checkpointed(kept, checkpoint.forward_peak, least, saved, begin)

    def _runs_twice(self, checkpoint: str, index: int, within: Cost) -> "_Twice":
        """Compare a layer in a checkpoint with the same layer, at the level within, outside.

        The second run stops early, though not before half of the pass.
        """
        forward, backward = self._seconds.of_run(index, checkpoint)
        more = backward - within.seconds
        return _Twice(forward - within.forward + max(more, 0.0), min(max(-more, 0.0), within.forward / 2))


class _Twice(NamedTuple):
    """What a checkpoint adds to a layer.

    Attributes:
        beyond: seconds beyond those of one more forward pass.
        saved: seconds that the second forward pass saves because it stops early.
    """

    beyond: float
    saved: float


def _undominated(costs: dict[str, Cost]) -> dict[str, Cost]:
    """Drop each choice that another choice equals or beats in every cost. Of equal choices the first stays.

    Each of the levels "output", "all" and "layer" runs again all that the one before does. Where these, without
    options, need equal bytes, the earlier one stays, because a shorter time of the later one is noise.
    """

    def beats(one: str, other: str) -> bool:
        a, b = costs[one], costs[other]
        bytes_of_a, bytes_of_b = ((c.may_be_inside, c.kept, c.forward_peak, c.backward_peak) for c in (a, b))
        if bytes_of_a == bytes_of_b and {one, other} <= {"output", "all", "layer"}:
            return order.index(one) < order.index(other)
        names = ("kept", "forward_peak", "backward_peak", "seconds", "inside", "offloaded")
        no_worse = a.may_be_inside >= b.may_be_inside and all(getattr(a, name) <= getattr(b, name) for name in names)
        return no_worse and (a != b or order.index(one) < order.index(other))

    order = list(costs)

    return {name: cost for name, cost in costs.items() if not any(beats(o, name) for o in costs if o != name)}
