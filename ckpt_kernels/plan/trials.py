"""The memory of each choice, from one recorded step with all layers at it, and which layers must not run twice.

MLPs in tiles are tried for each level at which they can be, in more and more tiles. Where these lower a peak of a
layer, the level in so many tiles is a choice like the levels themselves.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from ..bitwise_check import record_differences
from ..convert.module_tree import modules_of
from ..levels import CHECKPOINT, IN_TILES, NONE, OF_MODULES, Policy
from ..model_state import described, different
from .bench import EAGER, Bench, ByLayer, InRuns, is_out_of_memory
from .marks import NotAChain, Recorder, Segment, Where, peak_of, segments

# By default the first of these numbers of tiles is tried that leaves a tile rows enough: each number costs steps.
_TILES = (8, 4, 2)
# Of fewer rows a tile is not worth its calls, by the type of the device.
_LEAST_ROWS = {"cpu": 256, "cuda": 2048}
# More tiles lower a peak if it is less than this part of what it was.
_LOWER = 0.95


def called(choice: str) -> str:
    """The name of a whole step with all layers at a choice."""
    return EAGER if choice == NONE else choice


def tiles_in(choice: str) -> int:
    """How many tiles a choice has."""
    return Policy.of(choice, OF_MODULES, "choice").tiles or 1


class Peaks(NamedTuple):
    """The most bytes within a layer's passes, beyond what was there when each began."""

    forward: int
    backward: int

    def is_lower_than(self, other: "Peaks") -> bool:
        """Whether one of them is, by what is worth more tiles."""
        return self.forward < _LOWER * other.forward or self.backward < _LOWER * other.backward


class Trials:
    """The steps that were recorded.

    Attributes:
        recorders: of each choice.
        memory: of each choice, what lies between marks.
        peaks: of each choice, that of the step.
        notes: choices that were left out, and why.
        alone: layers that must not run twice.
        in_runs: layers that must not run twice together with those before them.
    """

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self.recorders: dict[str, Recorder] = {}
        self.memory: dict[str, dict[Where, Segment]] = {}
        self.peaks: dict[str, int] = {}
        self.notes: list[str] = []
        self.alone: set[str] = set()
        self.in_runs: set[str] = set()

    def run(self, tiles: Sequence[int] | None) -> None:
        """Makes the steps of all choices; of levels in tiles, for these numbers, or None for the most of `_TILES`.

        Raises:
            NotAChain: the layers are not called one after the other.
        """
        for choice in OF_MODULES:
            self._record(choice)
        if not self.recorders:
            return
        rows = max(map(_rows, next(iter(self.recorders.values())).shapes.values()), default=0)
        most_tiles = rows // _LEAST_ROWS[self._bench.device.type]
        fitting = [number for number in (_TILES if tiles is None else sorted(tiles)) if number <= most_tiles]
        for level in IN_TILES:
            if level != CHECKPOINT:
                self._record_tiles(level, fitting[:1] if tiles is None else fitting)
        # What runs in a checkpoint does so in the most tiles, in both its forward passes.
        most = max(map(tiles_in, self.memory))
        if most > 1:
            self._record(str(Policy(CHECKPOINT, most)))

    def _record(self, choice: str) -> bool:
        """Whether a step could be made."""
        bench = self._bench
        twin = bench.twin(None if choice == NONE else ByLayer(dict.fromkeys(bench.names, choice)))
        before = {} if self.recorders else _attributes(twin, bench.names)
        try:
            recorder, points = bench.step(f"memory of {called(choice)}", twin, memory=True)
            if Policy.of(choice, OF_MODULES, "choice").is_checkpoint and CHECKPOINT not in self.memory:
                self._run_twice(twin, [bench.names[layer] for layer in recorder.outputs])
        except NotAChain:
            raise
        except Exception as error:
            # As it is the model has to run; at a choice that its own code refuses it is left out.
            if choice == NONE and not is_out_of_memory(error):
                raise
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            self.notes.append(f"{called(choice)} is left out: {reason}")
            return False
        if before:
            self.alone |= _changed(before, _attributes(twin, bench.names))
        self.recorders[choice] = recorder
        self.memory[choice], self.peaks[choice] = segments(points), peak_of(points)
        return True

    def _record_tiles(self, level: str, tiles: Sequence[int]) -> None:
        """A level in more and more tiles, where they lower a peak of a layer. Two may be no better than one."""
        before = level if level in self.memory else None
        for number in tiles:
            choice = str(Policy(level, number))
            if not self._record(choice):
                return
            layers = range(len(self.recorders[choice].outputs))
            pairs = [(self.of(choice, layer), self.of(before, layer)) for layer in layers] if before else []
            if not before or any(new.is_lower_than(old) for new, old in pairs):
                before = choice
                continue
            for steps in (self.recorders, self.memory, self.peaks):
                del steps[choice]
            # No layer has anything that is in tiles.
            if all(new == old for new, old in pairs):
                return

    def of(self, choice: str, index: int) -> Peaks:
        """Of the i-th layer that is called."""
        return Peaks(*(self.memory[choice][what, index].peak for what in ("forward", "backward")))

    def _run_twice(self, twin: nn.Module, order: list[str]) -> None:
        """Which layers do not save the same, bit by bit, when they run again. One step tells that none differs; else
        another tells which do by themselves, and not because one before them in their checkpoint does."""
        self.in_runs = self._differing(self._bench.twin(InRuns(order)), "what runs twice")
        if self.in_runs:
            self.alone |= self._differing(twin, "what runs twice by itself")

    def _differing(self, twin: nn.Module, what: str) -> set[str]:
        with record_differences() as differing:
            self._bench.step(what, twin, memory=False)
        return {name for name, module in twin.named_modules() if module in differing}


def _rows(shapes: tuple) -> int:
    """Of what a layer is called with, as its MLP takes it: tokens."""
    return math.prod(shapes[0][0][:-1]) if shapes and shapes[0][0] else 0


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
