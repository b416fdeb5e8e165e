"""The fastest assignment of choices to a chain of stages for every amount of memory: a dynamic program over fronts.

The front of stages s..t follows from the ways on from s (`ways`): each with the front of what is behind it, and, under
a checkpoint, with that of the same stages when they run again. What a way needs is a maximum of sums that grow with
each part, and times add, so that no assignment that is beaten within a piece is part of a best one of the whole: the
fronts are exact as long as they are not thinned. Pieces that run again and whose stages are alike one by one have the
same front, which is made once.
"""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .costs import Assignment, Checkpoint, Stage, StageAt
from .fronts import INFEASIBLE, Front, both, fastest_at, front_of
from .ways import NOTHING, Chain

# Rows of the table of fronts: of no stages, and of what a level needs inside.
_EMPTY, _NO_INSIDE = 0, 1


class Solver:
    """The fronts of one chain.

    Args:
        stages: the chain, in the order of the forward pass.
        limit: how many labels a front may have.
        optimistic: whether thinning rounds down.
    """

    def __init__(self, stages: Sequence[Stage], limit: int = 512, optimistic: bool = False) -> None:
        self.is_thinned = False
        self._chain = Chain(stages)
        self._limit = limit
        self._optimistic = optimistic
        self._fronts = _Fronts()
        self._fronts.add(Front(torch.tensor([NOTHING]), torch.zeros(1, dtype=torch.float64)))
        self._fronts.add(Front(torch.tensor([0]), torch.zeros(1, dtype=torch.float64)))
        self._pieces = _Pieces(stages)
        self._ways: dict[tuple[int, bool], _Ways] = {}
        self._nested: dict[tuple[int, ...], int] = {}
        # By first stage; what is behind the last is empty.
        self._whole = [_EMPTY] * (len(stages) + 1)
        for first in reversed(range(len(stages))):
            self._whole[first] = self._fronts.add(self._front(first, len(stages) - 1, nested=False))

    @property
    def front(self) -> Front:
        """That of the whole chain."""
        return self._fronts.row(self._whole[0])

    def best(self, memory: int) -> Assignment | None:
        """The fastest assignment that needs no more memory than that, of equally fast ones the one that needs least;
        None where none fits."""
        front = self.front
        index = int(torch.searchsorted(front.needs, memory, right=True)) - 1
        if index < 0:
            return None
        return self._traced(0, len(self._chain.stages) - 1, int(front.needs[index]), nested=False)

    def _front(self, first: int, last: int, nested: bool) -> Front:
        ways = self._ways_within(first, last, nested)
        rest, rest_seconds = self._fronts.rows(self._behind(ways.ends, last, nested))
        again, again_seconds = self._fronts.rows(self._inside(ways, first))
        forwards = (rest + ways.kept).maximum(ways.forward_peak)
        backwards = again + (ways.base + self._chain.after(last, nested))
        needs, seconds = both(forwards, rest_seconds, backwards, again_seconds)
        seconds += ways.seconds
        front, is_thinned = front_of(needs.flatten(), seconds.flatten(), self._limit, self._optimistic)
        self.is_thinned |= is_thinned
        return front

    def _ways_within(self, first: int, last: int, nested: bool) -> "_Ways":
        """Those of a piece. Within a checkpoint another over all of what is left of it would gain nothing."""
        key = first, nested
        if key not in self._ways:
            self._ways[key] = _Ways.of(self._chain, first, nested)
        ways = self._ways[key]
        count = bisect.bisect(ways.ends, last - nested, ways.levels)
        return ways if count == len(ways.ends) else ways.until(count)

    def _behind(self, ends: list[int], last: int, nested: bool) -> list[int]:
        """The rows of the fronts of what comes after ways."""
        return [self._again(end + 1, last) if nested else self._whole[end + 1] for end in ends]

    def _inside(self, ways: "_Ways", first: int) -> list[int]:
        """The rows of the fronts of what runs again."""
        return [_NO_INSIDE] * ways.levels + [self._again(first, end) for end in ways.ends[ways.levels :]]

    def _again(self, first: int, last: int) -> int:
        """The row of the front of stages that run again under a checkpoint."""
        if first > last:
            return _EMPTY
        if self._pieces.key(first, last) not in self._nested:
            # The shortest first, so that what is behind a way is there.
            for begin in reversed(range(first, last + 1)):
                key = self._pieces.key(begin, last)
                if key not in self._nested:
                    self._nested[key] = self._fronts.add(self._front(begin, last, nested=True))
        return self._nested[self._pieces.key(first, last)]

    def _traced(self, first: int, last: int, memory: int, nested: bool) -> Assignment:
        """The assignment behind a label: at each stage the way that takes the least time."""
        parts: list[StageAt | Checkpoint] = []
        while first <= last:
            ways = self._ways_within(first, last, nested)
            for_rest = memory - ways.kept
            for_inside = memory - ways.base - self._chain.after(last, nested)
            seconds = ways.seconds + self._fronts.at(self._behind(ways.ends, last, nested), for_rest)
            seconds += self._fronts.at(self._inside(ways, first), for_inside)
            chosen = int(seconds.masked_fill_(ways.forward_peak > memory, INFEASIBLE).argmin())
            way = self._chain.ways(first, nested)[chosen]
            if way.level is not None:
                parts.append(StageAt(first, way.level))
            else:
                parts.append(Checkpoint(self._traced(first, way.end, int(for_inside[chosen]), nested=True)))
            first, memory = way.end + 1, int(for_rest[chosen])
        return tuple(parts)


class _Ways(NamedTuple):
    """Ways on from a stage as columns of numbers; the first of them are `levels`."""

    levels: int
    ends: list[int]
    forward_peak: Tensor
    kept: Tensor
    base: Tensor
    seconds: Tensor

    @staticmethod
    def of(chain: Chain, first: int, nested: bool) -> "_Ways":
        ways = chain.ways(first, nested)
        levels = sum(way.level is not None for way in ways)
        peaks, kept, base = torch.tensor([(w.forward_peak, w.kept, chain.base(w)) for w in ways])[:, :, None].unbind(1)
        seconds = torch.tensor([[way.seconds] for way in ways], dtype=torch.float64)
        return _Ways(levels, [way.end for way in ways], peaks, kept, base, seconds)

    def until(self, count: int) -> "_Ways":
        """The first of them."""
        columns = (column[:count] for column in (self.forward_peak, self.kept, self.base, self.seconds))
        return _Ways(self.levels, self.ends[:count], *columns)


class _Fronts:
    """A table of fronts, one a row. Rows that are shorter repeat their last label."""

    def __init__(self) -> None:
        self._needs = torch.zeros((64, 16), dtype=torch.int64)
        self._seconds = torch.zeros((64, 16), dtype=torch.float64)
        self._lengths: list[int] = []

    def add(self, front: Front) -> int:
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
        """Needs and seconds, as wide as the longest."""
        width, chosen = max(self._lengths[index] for index in indices), torch.tensor(indices)
        return self._needs[chosen, :width], self._seconds[chosen, :width]

    def at(self, indices: list[int], memory: Tensor) -> Tensor:
        """Of each the seconds of the fastest that fits an amount of memory; columns."""
        needs, seconds = self.rows(indices)
        return fastest_at(memory, needs, seconds)


class _Pieces:
    """Which pieces of a chain are alike stage by stage, by names of runs of 1, 2, 4, 8... stages."""

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
        """What is the same for pieces that are alike. Two runs that overlap tell all of a piece."""
        length = last - first + 1
        level = length.bit_length() - 1
        names = self._names[level]
        return length, names[first], names[last + 1 - (1 << level)]
