"""Fronts: of many assignments for a piece of a chain those that are worth having.

None of a front needs less memory and less time than another. Where one has more labels than a limit, those of nearly
the same memory are put together: of each cell, one of `limit` of equal width in the logarithm of memory, the fastest
is left, which is a real assignment still. An `optimistic` front takes the least memory and the least time of each
cell instead, which bounds from below what any assignment needs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

INFEASIBLE = float("inf")
# Memory of less than this part of the most is one cell.
_RANGE = 4096


class Front(NamedTuple):
    """Memory in bytes, ascending, and the seconds of the fastest assignment that needs no more, descending."""

    needs: Tensor
    seconds: Tensor

    def at(self, memory: int) -> float:
        """The seconds of the fastest that fits."""
        index = int(torch.searchsorted(self.needs, memory, right=True)) - 1
        return float(self.seconds[index]) if index >= 0 else INFEASIBLE


def front_of(needs: Tensor, seconds: Tensor, limit: int, optimistic: bool) -> tuple[Front, bool]:
    """The front of labels, and whether some were left out that are worth having."""
    # Sorting is what takes time: of very many labels those that no cell wants go before.
    is_thinned = len(needs) > 16 * limit
    if is_thinned:
        enough = needs <= needs[seconds == seconds.min()].min()
        needs, seconds = _thinned(needs[enough], seconds[enough], limit, optimistic)
    front = _pareto(needs, seconds)
    if len(front.needs) > limit:
        is_thinned = True
        front = _pareto(*_thinned(*front, limit, optimistic))
    return front, is_thinned


def both(one: Tensor, one_seconds: Tensor, other: Tensor, other_seconds: Tensor) -> tuple[Tensor, Tensor]:
    """Of pieces that each have to fit: for each amount of memory at which either takes less time, the seconds of both.

    Args:
        one, other: needs of fronts, one a row.
        one_seconds, other_seconds: their seconds.
    """
    seconds = torch.cat(
        (one_seconds + fastest_at(one, other, other_seconds), other_seconds + fastest_at(other, one, one_seconds)), 1
    )
    return torch.cat((one, other), 1), seconds


def fastest_at(memory: Tensor, needs: Tensor, seconds: Tensor) -> Tensor:
    """The seconds of the fastest that fits, a front and amounts of memory a row."""
    index = torch.searchsorted(needs, memory.contiguous(), right=True) - 1
    return seconds.gather(1, index.clamp_min(0)).masked_fill_(index < 0, INFEASIBLE)


def _thinned(needs: Tensor, seconds: Tensor, limit: int, optimistic: bool) -> tuple[Tensor, Tensor]:
    """At most one label a cell, and the one that needs least."""
    most = max(int(needs.max()), 1)
    least = max(int(needs.min()), most // _RANGE, 1)
    position = (needs.clamp_min(least).double() / least).log_()
    cells = (position * ((limit - 1) / max(float(position.max()), 1e-12))).long()
    best = torch.full((limit,), INFEASIBLE, dtype=torch.float64).scatter_reduce_(0, cells, seconds, "amin")
    at = needs if optimistic else needs.masked_fill(seconds > best[cells], most + 1)
    first = torch.full((limit,), most + 1).scatter_reduce_(0, cells, at, "amin")
    leanest = seconds.masked_fill(needs > needs[seconds < INFEASIBLE].min(), INFEASIBLE).argmin()[None]
    found = best < INFEASIBLE
    return torch.cat((needs[leanest], first[found])), torch.cat((seconds[leanest], best[found]))


def _pareto(needs: Tensor, seconds: Tensor) -> Front:
    """Of labels, what is beaten by none."""
    order = seconds.argsort(stable=True)
    order = order[needs[order].argsort(stable=True)]
    needs, seconds = needs[order], seconds[order]
    before = torch.full_like(seconds, INFEASIBLE)
    before[1:] = seconds.cummin(0).values[:-1]
    is_better = seconds < before
    return Front(needs[is_better], seconds[is_better])
