"""Pareto fronts of memory against time, over the assignments for a piece of a chain.

A label is the memory and the time of one assignment. No label of a front needs both less memory and less time than
another. A front with more labels than a limit is thinned: the range of memory is divided into `limit` cells of equal
width in the logarithm, and the fastest label of each cell stays, which is still a real assignment. An `optimistic`
front combines the least memory and the least time of each cell instead, a lower bound for every assignment.
"""

from typing import NamedTuple

import torch
from torch import Tensor

INFEASIBLE = float("inf")
# All labels with less memory than the largest divided by this number share one cell.
_RANGE = 4096


class Front(NamedTuple):
    """Memory in bytes, ascending, and the seconds of the fastest assignment within that memory, descending."""

    needs: Tensor
    seconds: Tensor

    def at(self, memory: int) -> float:
        """Return the seconds of the fastest assignment that fits in `memory` bytes."""
        index = int(torch.searchsorted(self.needs, memory, right=True)) - 1
        return float(self.seconds[index]) if index >= 0 else INFEASIBLE


def front_of(needs: Tensor, seconds: Tensor, limit: int, optimistic: bool) -> tuple[Front, bool]:
    """Return the front of labels, and whether undominated labels may have been dropped."""
    # Sorting dominates the cost, so a very long list is thinned before the sort.
    is_thinned = len(needs) > 16 * limit
    if is_thinned:
        enough = needs <= needs[seconds == seconds.min()].min()
        needs, seconds = _thinned(needs[enough], seconds[enough], limit, optimistic)
    front = _pareto(needs, seconds)
    if len(front.needs) > limit:
        is_thinned = True
        front = _pareto(*_thinned(*front, limit, optimistic))
    return front, is_thinned


def combined(one: Tensor, one_seconds: Tensor, other: Tensor, other_seconds: Tensor) -> tuple[Tensor, Tensor]:
    """Combine fronts of two pieces that share the same memory one after the other: seconds add.

    Args:
        one, other: memory of fronts, one front a row.
        one_seconds, other_seconds: the seconds of these fronts.

    Returns:
        The amounts of memory at which either piece gets faster, and the seconds of both pieces at each amount.
    """
    seconds = torch.cat(
        (one_seconds + fastest_at(one, other, other_seconds), other_seconds + fastest_at(other, one, one_seconds)), 1
    )
    return torch.cat((one, other), 1), seconds


def fastest_at(memory: Tensor, needs: Tensor, seconds: Tensor) -> Tensor:
    """Return the seconds of the fastest assignment that fits; each row is a front and amounts of memory for it."""
    index = torch.searchsorted(needs, memory.contiguous(), right=True) - 1
    return seconds.gather(1, index.clamp_min(0)).masked_fill_(index < 0, INFEASIBLE)


def _thinned(needs: Tensor, seconds: Tensor, limit: int, optimistic: bool) -> tuple[Tensor, Tensor]:
    """Keep at most one label of each cell, and the fastest label of the least memory."""
    most = max(int(needs.max()), 1)
    least = max(int(needs.min()), most // _RANGE, 1)
    position = (needs.clamp_min(least).double() / least).log_()
    cells = (position * ((limit - 1) / max(float(position.max()), 1e-12))).long()
    best = torch.full((limit,), INFEASIBLE, dtype=torch.float64).scatter_reduce_(0, cells, seconds, "amin")
    at = needs if optimistic else needs.masked_fill(seconds > best[cells], most + 1)
    first = torch.full((limit,), most + 1).scatter_reduce_(0, cells, at, "amin")
    leanest = seconds.masked_fill(needs > needs[seconds < INFEASIBLE].min(), INFEASIBLE).argmin()[None]
    is_filled = best < INFEASIBLE
    return torch.cat((needs[leanest], first[is_filled])), torch.cat((seconds[leanest], best[is_filled]))


def _pareto(needs: Tensor, seconds: Tensor) -> Front:
    """Return the labels that no other label dominates."""
    order = seconds.argsort(stable=True)
    order = order[needs[order].argsort(stable=True)]
    needs, seconds = needs[order], seconds[order]
    before = torch.full_like(seconds, INFEASIBLE)
    before[1:] = seconds.cummin(0).values[:-1]
    is_better = seconds < before
    return Front(needs[is_better], seconds[is_better])
