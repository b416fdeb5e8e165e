"""Records the memory of each choice in one step with all layers at that choice, and finds layers that cannot run twice.

Each level that supports MLPs in tiles is tried in increasing numbers of tiles. If a number lowers a peak of a layer,
the level in that number of tiles becomes a choice of its own.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from ..bitwise_check import record_differences
from ..convert.module_tree import modules_of
from ..levels import CHECKPOINT, IN_TILES, NONE, OF_MODULES, Policy
from ..model_state import described, different
from .bench import EAGER, Bench, ChoiceByLayer, RunsOfLayers, is_out_of_memory
from .marks import NotAChain, Position, Recorder, Segment, peak_of, segments
from .offloading import LEVELS as OFFLOADED

# By default only the first of these numbers that leaves each tile enough rows is tried, since each number costs steps.
_TILES = (8, 4, 2)
# With fewer rows the calls of a tile cost more than the tile saves; by the type of the device.
_LEAST_ROWS = {"cpu": 256, "cuda": 2048}
# More tiles are worthwhile if they bring a peak below this fraction.
_LOWER = 0.95


def step_name(choice: str) -> str:
    """Return the name of a step with all layers at a choice."""
    return EAGER if choice == NONE else choice


def tiles_in(choice: str) -> int:
    """Return the number of tiles of a choice."""
    return Policy.of(choice, OF_MODULES, "choice").tiles or 1


class Peaks(NamedTuple):
    """The peaks of a layer's passes, each in bytes above the bytes at the start of the pass."""

    forward: int
    backward: int

    def is_lower_than(self, other: "Peaks") -> bool:
        """Whether one of the peaks is lower by enough to be worth more tiles."""
        return self.forward < _LOWER * other.forward or self.backward < _LOWER * other.backward


class Trials:
    """The recorded steps.

    Attributes:
        recorders: the recorder of each choice.
        memory: the segments of each choice's step.
        peaks: the peak of each choice's step.
        notes: choices that were skipped, and why.
        not_repeatable: layers that must not run twice.
        not_repeatable_in_runs: layers that must not run twice in one checkpoint with the layers before them.
    """

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self.recorders: dict[str, Recorder] = {}
        self.memory: dict[str, dict[Position, Segment]] = {}
        self.peaks: dict[str, int] = {}
        self.notes: list[str] = []
        self.not_repeatable: set[str] = set()
        self.not_repeatable_in_runs: set[str] = set()

    def run(self, tiles: Sequence[int] | None, offload: bool = False) -> None:
        """Record a step of each choice.

        Args:
            tiles: the numbers of tiles to try; None tries the largest of `_TILES` that leaves each tile enough rows.
            offload: whether to record layers that are offloaded too.

        Raises:
            NotAChain: the layers are not called one after the other.
        """
        for choice in OF_MODULES:
            self._record(choice)
        if offload:
            for level in OFFLOADED:
                self._record(str(Policy(level, None, True)))
        if not self.recorders:
            return
        rows = max(map(_rows, next(iter(self.recorders.values())).shapes.values()), default=0)
        most_tiles = rows // _LEAST_ROWS[self._bench.device.type]
        fitting = [number for number in (_TILES if tiles is None else sorted(tiles)) if number <= most_tiles]
        for level in IN_TILES:
            if level != CHECKPOINT:
                self._record_tiles(level, fitting[:1] if tiles is None else fitting)
        # A checkpoint uses the largest number of tiles in both forward passes.
        most = max(map(tiles_in, self.memory))
        if most > 1:
            self._record(str(Policy(CHECKPOINT, most)))
        if offload and most > 1:
            for level in OFFLOADED:
                self._record(str(Policy(level, most, True)))

    def _record(self, choice: str) -> bool:
        """Record a step with all layers at a choice; False if the step failed."""
        bench = self._bench
        twin = bench.twin(None if choice == NONE else ChoiceByLayer(dict.fromkeys(bench.names, choice)))
        before = {} if self.recorders else _attributes(twin, bench.names)
        try:
            recorder, points = bench.step(f"memory of {step_name(choice)}", twin, memory=True)
            if Policy.of(choice, OF_MODULES, "choice").is_checkpoint and CHECKPOINT not in self.memory:
                self._find_not_repeatable(twin, [bench.names[layer] for layer in recorder.outputs])
        except NotAChain:
            raise
        except Exception as error:
            # The model as it is must run. A choice that the model's own code refuses is skipped.
            if choice == NONE and not is_out_of_memory(error):
                raise
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            self.notes.append(f"{step_name(choice)} is left out: {reason}")
            return False
        if before:
            self.not_repeatable |= _changed(before, _attributes(twin, bench.names))
        self.recorders[choice] = recorder
        self.memory[choice], self.peaks[choice] = segments(points), peak_of(points)
        return True

    def _record_tiles(self, level: str, tiles: Sequence[int]) -> None:
        """Record a level in increasing numbers of tiles, and drop each number that lowers no peak of a layer.

        A number that lowers none does not end the search: two tiles may be no better than one where four are.
        """
        before = level if level in self.memory else None
        for number in tiles:
            choice = str(Policy(level, number))
            if not self._record(choice):
                return
            layers = range(len(self.recorders[choice].outputs))
            pairs = [(self.layer_peaks(choice, i), self.layer_peaks(before, i)) for i in layers] if before else []
            if not before or any(new.is_lower_than(old) for new, old in pairs):
                before = choice
                continue
            for steps in (self.recorders, self.memory, self.peaks):
                del steps[choice]
            # Equal peaks in all layers: no layer has an MLP that runs in tiles.
            if all(new == old for new, old in pairs):
                return

    def layer_peaks(self, choice: str, index: int) -> Peaks:
        """Return the peaks of the i-th called layer."""
        return Peaks(*(self.memory[choice][part, index].peak for part in ("forward", "backward")))

    def _find_not_repeatable(self, twin: nn.Module, order: list[str]) -> None:
        """Find layers that do not save bitwise equal tensors when they run again.

        One step with the layers in runs shows whether any layer differs. If so, a second step with each layer in its
        own checkpoint separates layers that differ by themselves from those that follow such a layer in a run.
        """
        self.not_repeatable_in_runs = self._differing(self._bench.twin(RunsOfLayers(order)), "what runs twice")
        if self.not_repeatable_in_runs:
            self.not_repeatable |= self._differing(twin, "what runs twice by itself")

    def _differing(self, twin: nn.Module, title: str) -> set[str]:
        with record_differences() as differing:
            self._bench.step(title, twin, memory=False)
        return {name for name, module in twin.named_modules() if module in differing}


def _rows(shapes: tuple) -> int:
    """Return the number of tokens in a layer's first tensor, which are the rows of the layer's MLP."""
    return math.prod(shapes[0][0][:-1]) if shapes and shapes[0][0] else 0


# Attributes that torch gives every module.
_TORCH_ATTRIBUTES = frozenset(vars(nn.Module()))


def _attributes(twin: nn.Module, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Describe the state that a layer's Python code can write: attributes, and the identity of buffers.

    The contents of buffers are left out, since a checkpoint restores them for the second forward pass.
    """
    modules = dict(twin.named_modules())
    state: dict[str, dict[str, Any]] = {}
    for name in names:
        state[name] = {}
        for index, module in enumerate(modules_of(modules[name])):
            own = {key: described(value) for key, value in vars(module).items() if key not in _TORCH_ATTRIBUTES}
            own |= {f"buffer {key}": id(buffer) for key, buffer in module._buffers.items()}
            state[name] |= {f"{index}.{key}": value for key, value in own.items()}
    return state


def _changed(before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> set[str]:
    """Return the layers that wrote to their own attributes. A second run would write twice."""
    return {name for name in before if different(before[name], after[name])}
