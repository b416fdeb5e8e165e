"""Solves for the fastest assignment for every amount of memory, by dynamic programming over Pareto fronts.

The front of stages s..t combines each transition from s (see `chain`) with the front of the stages after the transition
and, for a checkpoint, with the front of the second run of the same stages. The need of a transition is a maximum of
sums that grow with each part, and times add, so a dominated assignment of a piece is part of no optimal assignment of
the whole: fronts are exact unless they are thinned. Pieces that run a second time and consist of equal stages share one
front.
"""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .chain import NOTHING, Chain
from .costs import Assignment, Checkpoint, Stage, StageAt
from .fronts import INFEASIBLE, Front, combined, fastest_at, front_of

# Rows of the table of fronts: the front of no stages, and the front of the inside of a level.
_EMPTY, _NO_INSIDE = 0, 1


class Solver:
    """The fronts of one chain.

    Args:
        stages: the chain, in the order of the forward pass.
        limit: the largest number of labels of a front.
        optimistic: whether thinned fronts are lower bounds (see `fronts`).

    Attributes:
        is_thinned: whether any front was thinned.
    """

    def __init__(self, stages: Sequence[Stage], limit: int = 1024, optimistic: bool = False) -> None:
        self.is_thinned = False
        self._chain = Chain(stages)
        self._limit = limit
        self._optimistic = optimistic
        self._fronts = _Fronts()
        self._fronts.add(Front(torch.tensor([NOTHING]), torch.zeros(1, dtype=torch.float64)))
        self._fronts.add(Front(torch.tensor([0]), torch.zeros(1, dtype=torch.float64)))
        self._pieces = _Pieces(stages)
        self._transitions: dict[tuple[int, bool], _Transitions] = {}
        self._nested: dict[tuple[int, ...], int] = {}
        # _whole[s]: the row of the front from stage s to the end of the chain.
        self._whole = [_EMPTY] * (len(stages) + 1)
        for first in reversed(range(len(stages))):
            self._whole[first] = self._fronts.add(self._front(first, len(stages) - 1, nested=False))

    @property
    def front(self) -> Front:
        """The front of the whole chain."""
        return self._fronts.row(self._whole[0])

    def best(self, memory: int) -> Assignment | None:
        """Return the fastest assignment that fits in `memory` bytes, or None if none fits.

        Of equally fast assignments the one that needs least memory is returned.
        """
        front = self.front
        index = int(torch.searchsorted(front.needs, memory, right=True)) - 1
        if index < 0:
            return None
        return self._trace(0, len(self._chain.stages) - 1, int(front.needs[index]), nested=False)

    def _front(self, first: int, last: int, nested: bool) -> Front:
        """Compute the front of a piece; `nested` pieces are the second run in a checkpoint."""
        transitions = self._transitions_within(first, last, nested)
        rest, rest_seconds = self._fronts.rows(self._rest_rows(transitions.ends, last, nested))
        inside, inside_seconds = self._fronts.rows(self._inside_rows(transitions, first))
        forwards = (rest + transitions.kept).maximum(transitions.forward_peak)
        backwards = inside + (transitions.base + self._chain.after(last, nested))
        needs, seconds = combined(forwards, rest_seconds, backwards, inside_seconds)
        seconds += transitions.seconds
        front, is_thinned = front_of(needs.flatten(), seconds.flatten(), self._limit, self._optimistic)
        self.is_thinned |= is_thinned
        return front

    def _transitions_within(self, first: int, last: int, nested: bool) -> "_Transitions":
        """Return the transitions from `first` that end within a piece.

        A nested checkpoint over the whole rest of a checkpoint would gain nothing and is left out.
        """
        key = first, nested
        if key not in self._transitions:
            self._transitions[key] = _Transitions.of(self._chain, first, nested)
        transitions = self._transitions[key]
        count = bisect.bisect(transitions.ends, last - nested, transitions.levels)
        return transitions if count == len(transitions.ends) else transitions.until(count)

    def _rest_rows(self, ends: list[int], last: int, nested: bool) -> list[int]:
        """Return the rows of the fronts of the stages after each transition."""
        return [self._nested_row(end + 1, last) if nested else self._whole[end + 1] for end in ends]

    def _inside_rows(self, transitions: "_Transitions", first: int) -> list[int]:
        """Return the rows of the fronts of the inside of each transition."""
        levels, ends = transitions.levels, transitions.ends
        return [_NO_INSIDE] * levels + [self._nested_row(first, end) for end in ends[levels:]]

    def _nested_row(self, first: int, last: int) -> int:
        """Return the row of the front of stages that run a second time under a checkpoint."""
        if first > last:
            return _EMPTY
        if self._pieces.key(first, last) not in self._nested:
            # The shortest first, so that the fronts of the rest exist already.
            for begin in reversed(range(first, last + 1)):
                key = self._pieces.key(begin, last)
                if key not in self._nested:
                    self._nested[key] = self._fronts.add(self._front(begin, last, nested=True))
        return self._nested[self._pieces.key(first, last)]

    def _trace(self, first: int, last: int, memory: int, nested: bool) -> Assignment:
        """Recover the assignment of a label: at each stage follow the transition that takes the least time."""
        parts: list[StageAt | Checkpoint] = []
        while first <= last:
            transitions = self._transitions_within(first, last, nested)
            for_rest = memory - transitions.kept
            for_inside = memory - transitions.base - self._chain.after(last, nested)
            rest, inside = self._rest_rows(transitions.ends, last, nested), self._inside_rows(transitions, first)
            seconds = transitions.seconds + self._fronts.at(rest, for_rest)
            seconds += self._fronts.at(inside, for_inside)
            chosen = int(seconds.masked_fill_(transitions.forward_peak > memory, INFEASIBLE).argmin())
            transition = self._chain.transitions(first, nested)[chosen]
            if transition.level is not None:
                parts.append(StageAt(first, transition.level))
            else:
                parts.append(Checkpoint(self._trace(first, transition.end, int(for_inside[chosen]), nested=True)))
            first, memory = transition.end + 1, int(for_rest[chosen])
        return tuple(parts)


class _Transitions(NamedTuple):
    """The transitions from a stage as columns of numbers. The first `levels` of them are levels."""

    levels: int
    ends: list[int]
    forward_peak: Tensor
    kept: Tensor
    base: Tensor
    seconds: Tensor

    @staticmethod
    def of(chain: Chain, first: int, nested: bool) -> "_Transitions":
        transitions = chain.transitions(first, nested)
        levels = sum(one.level is not None for one in transitions)
        ends = [one.end for one in transitions]
        memory = torch.tensor([(one.forward_peak, one.kept, chain.base(one)) for one in transitions])
        forward_peak, kept, base = memory[:, :, None].unbind(1)
        seconds = torch.tensor([[one.seconds] for one in transitions], dtype=torch.float64)
        return _Transitions(levels, ends, forward_peak, kept, base, seconds)

    def until(self, count: int) -> "_Transitions":
        """Return the first `count` transitions."""
        columns = (column[:count] for column in (self.forward_peak, self.kept, self.base, self.seconds))
        return _Transitions(self.levels, self.ends[:count], *columns)


class _Fronts:
    """A table with a front in each row. Shorter rows repeat their last label."""

    def __init__(self) -> None:
        self._needs = torch.zeros((64, 16), dtype=torch.int64)
        self._seconds = torch.zeros((64, 16), dtype=torch.float64)
        self._lengths: list[int] = []

    def add(self, front: Front) -> int:
        """Add a front and return the number of its row. The table grows as needed."""
        row, length = len(self._lengths), len(front.needs)
        rows, columns = self._needs.shape
        if row == rows or length > columns:
            more = (0, max(length, columns) - columns, 0, rows if row == rows else 0)
            self._needs, self._seconds = (torch.nn.functional.pad(t, more) for t in (self._needs, self._seconds))
            self._needs[:row, columns:] = self._needs[:row, columns - 1 : columns]
            self._seconds[:row, columns:] = self._seconds[:row, columns - 1 : columns]
        for table, values in ((self._needs, front.needs), (self._seconds, front.seconds)):
            table[row, :length] = values
            table[row, length:] = values[-1]
        self._lengths.append(length)
        return row

    def row(self, index: int) -> Front:
        length = self._lengths[index]
        return Front(self._needs[index, :length], self._seconds[index, :length])

    def rows(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Return needs and seconds of fronts, as wide as the longest front."""
        width, chosen = max(self._lengths[index] for index in indices), torch.tensor(indices)
        return self._needs[chosen, :width], self._seconds[chosen, :width]

    def at(self, indices: list[int], memory: Tensor) -> Tensor:
        """Return for each front the seconds of the fastest assignment within `memory`, a column; so is the result."""
        needs, seconds = self.rows(indices)
        return fastest_at(memory, needs, seconds)


class _Pieces:
    """Finds pieces of a chain that are alike stage by stage.

    Each run of 1, 2, 4, 8, ... stages has a number, which runs of equal stages share.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        names: dict[tuple, int] = {}
        level = [names.setdefault((stage.alike, stage.follows), len(names)) for stage in stages]
        self._names = [level]
        length = 1
        while 2 * length <= len(stages):
            names = {}
            level = [names.setdefault(pair, len(names)) for pair in zip(level, level[length:], strict=False)]
            self._names.append(level)
            length *= 2

    def key(self, first: int, last: int) -> tuple[int, int, int]:
        """Return a key that alike pieces share. Two runs that overlap cover a piece of any length."""
        length = last - first + 1
        level = length.bit_length() - 1
        names = self._names[level]
        return length, names[first], names[last + 1 - (1 << level)]
