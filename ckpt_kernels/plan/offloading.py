"""Plans that keep tensors of some layers in host memory: their costs, and the best of such plans and of others.

With offloaded layers a chain leaves a reserve (see `chain`), which depends on the assignment. So each amount that a
choice moves to host memory is taken as the reserve of a chain without choices that move more; each chain is solved for
itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from ..levels import OF_MODULES, Policy
from .chain import with_reserve
from .costs import Assignment, Stage
from .fronts import Front, front_of
from .marks import Position, Segment
from .solve import Solver

# The levels at which layers are offloaded, all of them in IN_TILES. Lower levels keep more, and so would move more.
LEVELS = ("output", "all", "layer")
# The largest number of labels of the front of all plans.
_LIMIT = 4096
# The chain is solved once for each of so many reserves. Layers that all differ would take hundreds.
_MOST_RESERVES = 16


def is_offloaded(choice: str) -> bool:
    policy = Policy.read(choice, OF_MODULES)
    return policy is not None and policy.is_offloaded


def offloaded_cost(
    memory: Mapping[Position, Segment], offloaded: Sequence[int], gap: int, index: int
) -> tuple[int, int, int]:
    """Return what the i-th layer keeps on the device, the peak of its backward pass, and `Stage.left`.

    Args:
        memory: the segments of a step with all layers offloaded.
        offloaded: the bytes that each layer moved to host memory, in the order of the calls.
        gap: the net bytes of the code after the layer in plans without offload. The caller of a layer may free the
            layer's input, which the device keeps no longer, only in this code.
        index: the number of the layer.
    """
    forward, backward = memory["forward", index], memory["backward", index]
    freed = min(memory["forward_gap", index + 1].net - gap, 0)
    kept = max(forward.net + freed, 0)
    is_last = index == len(offloaded) - 1
    prefetched = offloaded[index - 1] if index else 0
    # The layer after this one has prefetched this layer's tensors, which the chain does not count before this pass.
    own = 0 if is_last else offloaded[index]
    return kept, max(backward.peak + own - prefetched, 0), kept + backward.net + own - prefetched


class Solutions:
    """The best assignments of a chain of stages, with offloaded layers and without.

    Args:
        stages: the chain, in the order of the forward pass. The last stage is the code after the last layer.
        optimistic: see `solve.Solver`.

    Attributes:
        is_thinned: whether any front was thinned.
        front: the front of all assignments.
    """

    def __init__(self, stages: Sequence[Stage], optimistic: bool = False) -> None:
        reserves = sorted({cost.offloaded for stage in stages for cost in stage.costs.values()})
        if len(reserves) > _MOST_RESERVES:
            # An amount between two of the rest is taken for the larger one, which is on the safe side.
            reserves = [reserves[i * (len(reserves) - 1) // (_MOST_RESERVES - 1)] for i in range(_MOST_RESERVES)]
        chains = [_moving_at_most(stages, reserve) for reserve in reserves]
        self._solvers = [Solver(chain, optimistic=optimistic) for chain in chains if all(s.costs for s in chain)]
        fronts = [solver.front for solver in self._solvers]
        is_thinned = False
        self.front: Front = fronts[0]
        if len(fronts) > 1:
            needs, seconds = (torch.cat(column) for column in zip(*fronts, strict=True))
            self.front, is_thinned = front_of(needs, seconds, _LIMIT, optimistic)
        self.is_thinned = is_thinned or any(solver.is_thinned for solver in self._solvers)

    def best(self, memory: int) -> Assignment | None:
        """Return the fastest assignment that fits in `memory` bytes, or None if none fits.

        Of equally fast assignments the one that moves fewer bytes in a layer is returned.
        """
        return min(self._solvers, key=lambda solver: solver.front.at(memory)).best(memory)


def _moving_at_most(stages: Sequence[Stage], reserve: int) -> Sequence[Stage]:
    """The chain without choices that move more bytes to host memory, and with the reserve."""
    chain = [
        replace(stage, costs={name: cost for name, cost in stage.costs.items() if cost.offloaded <= reserve})
        for stage in stages
    ]
    return with_reserve(chain, reserve)
