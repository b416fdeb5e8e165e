"""The fastest assignment of choices to a chain of stages for every amount of memory: a dynamic program over fronts.

A `Front` holds all assignments of a piece of the chain that are worth having: none needs less memory and less time than
another. The front of stages s..t follows from that of s+1..t by what is chosen for s:

- a level c. The memory needed is the most of what s takes forward; what c keeps, and on top what the rest needs; what
  c keeps, what the rest leaves, and on top what s takes backward.
- a checkpoint over s..r. The memory needed is the most of what s..r take forward with nothing kept; the output of r,
  and on top what r+1..t need; the output of r, what r+1..t leave, and on top what s..r need when they run again, which
  is a front of its own.

Both are maxima of sums, so that no assignment that is beaten within a piece is part of a best one of the whole: the
fronts are exact as long as they are not thinned. Where one grows beyond `limit` labels, labels of nearly the same
memory are left out, which are real assignments still; with `optimistic` they are rounded down in both, which bounds
from below how fast any assignment can be.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .costs import Assignment, Choice, Run, Stage

# Runs under one checkpoint have any number of stages up to that, and some numbers beyond.
ALL_LENGTHS = 16
_INFEASIBLE = float("inf")


class Front(NamedTuple):
    """Memory in bytes, ascending, and the seconds of the fastest assignment that needs no more, descending."""

    needs: Tensor
    seconds: Tensor

    def at(self, memory: int) -> float:
        """The seconds of the fastest that fits."""
        index = int(torch.searchsorted(self.needs, memory, right=True)) - 1
        return float(self.seconds[index]) if index >= 0 else _INFEASIBLE


_EMPTY = Front(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64))


class _Span(NamedTuple):
    """What a checkpoint over some stages costs apart from its inside."""

    forward_peak: int
    kept: int
    seconds: float


class Solver:
    """The fronts of one chain.

    Args:
        stages: the chain, in the order of the forward pass.
        limit: how many labels a front may have.
        optimistic: whether thinning rounds down.
    """

    def __init__(self, stages: Sequence[Stage], limit: int = 1024, optimistic: bool = False) -> None:
        self.stages = stages
        self.is_thinned = False
        self._limit = limit
        self._optimistic = optimistic
        self._left = [0, *itertools.accumulate(stage.left for stage in stages)]
        self._nested: dict[tuple, Front] = {}
        self._whole: list[Front] = [_EMPTY] * (len(stages) + 1)
        for first in reversed(range(len(stages))):
            self._whole[first] = self._front(first, len(stages) - 1)

    @property
    def front(self) -> Front:
        """That of the whole chain."""
        return self._whole[0]

    def best(self, memory: int) -> Assignment | None:
        """The fastest assignment that needs no more memory than that, of equally fast ones the one that needs least;
        None where none fits."""
        index = int(torch.searchsorted(self.front.needs, memory, right=True)) - 1
        if index < 0:
            return None
        return self._traced(0, len(self.stages) - 1, int(self.front.needs[index]), nested=False)

    def _front(self, first: int, last: int, nested: bool = False) -> Front:
        found = []
        rest = self._tail(first + 1, last, nested)
        done = self._closed(last, nested)
        for cost in self.stages[first].costs.values():
            backward = cost.kept + self._left_by(first + 1, last) + cost.backward_peak - done
            needs = rest.needs + cost.kept if first < last else rest.needs
            found.append(Front(needs.clamp_min(max(cost.forward_peak, backward)), rest.seconds + cost.seconds))
        for end, span in self._spans(first, last, nested):
            again = self._inside(first, end)
            backwards = again.needs + span.kept + self._left_by(end + 1, last) - done
            rest = self._tail(end + 1, last, nested)
            forwards = (rest.needs + span.kept if end < last else rest.needs).clamp_min(span.forward_peak)
            found.append(_both(Front(backwards, again.seconds + span.seconds), Front(forwards, rest.seconds)))
        return self._thinned(_pareto(found))

    def _tail(self, first: int, last: int, nested: bool) -> Front:
        if first > last:
            return _EMPTY
        return self._inside(first, last, whole=False) if nested else self._whole[first]

    def _inside(self, first: int, last: int, whole: bool = True) -> Front:
        """The front of stages that run again under a checkpoint. Stages that are alike have the same one."""
        key = tuple((stage.alike, stage.follows) for stage in self.stages[first : last + 1])
        if key not in self._nested:
            self._nested[key] = self._front(first, last, nested=True)
        return self._nested[key]

    def _closed(self, last: int, nested: bool) -> int:
        """In a second forward pass the output of the last stage goes at once."""
        return self.stages[last].output if nested else 0

    def _left_by(self, first: int, last: int) -> int:
        return self._left[last + 1] - self._left[first] if first <= last else 0

    def _spans(self, first: int, last: int, nested: bool) -> Iterator[tuple[int, _Span]]:
        """The checkpoints that may begin at a stage, by their last stage."""
        forward_peak, kept, seconds, before = 0, 0, 0.0, 0
        for end in range(first, last + 1):
            stage = self.stages[end]
            if stage.checkpointed is None or (end > first and not stage.follows):
                return
            forward_peak = max(forward_peak, kept + before + stage.checkpointed.forward_peak)
            kept += stage.checkpointed.kept
            seconds += stage.checkpointed.forward
            before = stage.output
            # Within a checkpoint another over all of it would gain nothing.
            if _is_length(end - first + 1) and not (nested and end == last):
                yield end, _Span(forward_peak, kept + stage.output, seconds - stage.checkpointed.saved)

    def _thinned(self, front: Front) -> Front:
        count = len(front.needs)
        if count <= self._limit:
            return front
        self.is_thinned = True
        low, high = int(front.needs[0]), int(front.needs[-1])
        cell = (front.needs - low) * self._limit // max(high - low + 1, 1)
        is_first = torch.ones(count, dtype=torch.bool)
        is_first[1:] = cell[1:] != cell[:-1]
        is_last = torch.ones(count, dtype=torch.bool)
        is_last[:-1] = is_first[1:]
        if self._optimistic:
            return Front(front.needs[is_first], front.seconds[is_last])
        # The leanest stays, whatever it is beside.
        is_last[0] = True
        return Front(front.needs[is_last], front.seconds[is_last])

    def _traced(self, first: int, last: int, memory: int, nested: bool) -> Assignment:
        """The assignment behind a label: at each stage the choice that leaves the least time for what it leaves."""
        parts: list[Choice | Run] = []
        while first <= last:
            best: tuple[float, Choice | None, int, int] = (_INFEASIBLE, None, first, 0)
            done = self._closed(last, nested)
            rest = self._tail(first + 1, last, nested)
            for level, cost in self.stages[first].costs.items():
                backward = cost.kept + self._left_by(first + 1, last) + cost.backward_peak - done
                if max(cost.forward_peak, backward) <= memory:
                    seconds = cost.seconds + (rest.at(memory - cost.kept) if first < last else 0.0)
                    if seconds < best[0]:
                        best = seconds, Choice(first, level), first, memory - cost.kept
            for end, span in self._spans(first, last, nested):
                inside = memory - span.kept - self._left_by(end + 1, last) + done
                if span.forward_peak <= memory:
                    after = self._tail(end + 1, last, nested).at(memory - span.kept) if end < last else 0.0
                    seconds = span.seconds + self._inside(first, end).at(inside) + after
                    if seconds < best[0]:
                        best = seconds, None, end, memory - span.kept
            _, choice, end, left = best
            if choice is None:
                span = dict(self._spans(first, last, nested))[end]
                inside = memory - span.kept - self._left_by(end + 1, last) + done
                parts.append(Run(self._traced(first, end, inside, nested=True)))
            else:
                parts.append(choice)
            first, memory = end + 1, left
        return tuple(parts)


def _both(one: Front, other: Front) -> Front:
    """Of two pieces that each have to fit: for each amount of memory the seconds of both.

    Each front is a step function, so their sum steps where either does.
    """
    needs = torch.cat((one.needs, other.needs))
    steps = torch.cat([front.seconds.diff(prepend=torch.zeros(1, dtype=torch.float64)) for front in (one, other)])
    order = needs.argsort(stable=True)
    needs, seconds = needs[order], steps[order].cumsum(0)
    fits = needs >= max(int(one.needs[0]), int(other.needs[0]))
    # Of steps at the same place the last has all of them.
    fits[:-1] &= needs[1:] > needs[:-1]
    return Front(needs[fits], seconds[fits])


def _pareto(fronts: Sequence[Front]) -> Front:
    """Of several, what is beaten by none."""
    needs = torch.cat([front.needs for front in fronts])
    seconds = torch.cat([front.seconds for front in fronts])
    order = seconds.argsort(stable=True)
    order = order[needs[order].argsort(stable=True)]
    needs, seconds = needs[order], seconds[order]
    is_better = torch.ones(len(seconds), dtype=torch.bool)
    is_better[1:] = seconds[1:] < seconds.cummin(0).values[:-1]
    return Front(needs[is_better], seconds[is_better])


def _is_length(stages: int) -> bool:
    """Every length up to `ALL_LENGTHS`, and beyond that two to a doubling: 24, 32, 48, 64, ..."""
    half = ALL_LENGTHS // 2
    while stages >= 4 * half:
        half *= 2
    return stages <= ALL_LENGTHS or stages % half == 0
