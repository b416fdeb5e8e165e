"""The planner: for each layer of a model what to keep, so that a step is the fastest that fits a budget of memory.

    plan = ckpt_kernels.plan(model, batch, budget="12GiB")
    print(plan)
    plan.apply()

`layers` finds the layers of a model. `bench` runs steps of it, in which `marks` tells where a layer begins and ends.
`measure` makes of these the cost of each choice for each layer (`trials` its memory, `timing` its seconds), a chain of
stages (`stages`, `costs`).
`ways` says what an assignment of choices to them costs, and `solve` finds the fastest for every amount of memory, in
`fronts`. `search` tries what is found, against the same level for all layers too. `Plan` is the result.
"""

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..functional.checks import is_count
from ..model_argument import check_model
from .bench import Bench
from .budget import Budget, DoesNotFit, bytes_of
from .marks import NotAChain
from .measure import Measured, measured
from .plan import Plan
from .search import allowed, fastest, one_level

__all__ = ["DoesNotFit", "Plan", "plan"]


def plan(
    model: nn.Module,
    *inputs: Any,
    budget: Budget,
    loss: Callable[[Any], Tensor] | None = None,
    tiles: Iterable[int] | None = None,
    progress: Callable[[str], None] | None = None,
    **kwargs: Any,
) -> Plan:
    """The fastest training step of `model(*inputs, **kwargs)` that fits the budget.

    A budget bounds the bytes that a step, forward and backward, makes on the device beside parameters, their gradients,
    optimizer state and inputs, as `memory.peak_bytes` measures them where the gradients are there before.

    For each layer, a member of a `ModuleList` or `Sequential` with a norm and at least two matrices, it chooses one of
    the levels of `convert`, with its MLPs in tiles or not, or to leave the layer as it is, or to checkpoint it, by
    itself or together with others in a row; of those in a checkpoint too. Costs are measured in steps of the model on
    these inputs; the choice is the best one by these costs; then a step is measured with it, and where that is above
    the budget another choice is made. The model, its gradients and random numbers stay as they are: steps run on copies
    that share the parameters' memory. Hooks run in these steps too, and what cannot be copied, a lock or an iterator
    that the model holds, is shared with the copies. `Plan.apply` converts the model.

    A layer is offered a checkpoint only if it saved the same, bit by bit, when it ran again in one of the steps, and
    wrote to no attribute of its own. Layers that are called more than once a step, or left out at random, are not
    chosen for: then one level is chosen for the whole model.

    Args:
        model: a module, converted or not, whose layers run one after the other.
        inputs, kwargs: what the model is called with, of the size that the budget is for.
        budget: bytes, a size such as "12GiB", a float up to 1 for a fraction of eager's peak, "device" for what is free
            on the GPU but 5 % (call it after a step of the optimizer, which makes its state then), or None for as much
            as the fastest plan takes.
        loss: the loss of what the model returns. By default the output's own `loss`, or the sum of its tensors.
        tiles: numbers of tiles that MLPs may take their tokens in, at levels that can be in tiles. Those are tried that
            leave a tile at least 256 tokens (2,048 on a GPU), and chosen among where they lower a layer's peak. None is
            the largest such number of 8, 4 and 2; () is none.
        progress: called with a line before each step that is made. By default lines go to a terminal's stderr.

    Returns:
        A `Plan`, which prints as a table.

    Raises:
        DoesNotFit: no choice fits; the error's `least` are the fewest bytes of any.
        MemoryError: a step does not fit into memory at any choice, so that nothing can be measured.
        TypeError, ValueError: the model is no module, or compiled or sharded already, or cannot be copied; the budget
            or the loss is none; a number of tiles is none above 1; the output has no gradient.

    Example:
        >>> layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        >>> model = torch.nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        >>> plan = ckpt_kernels.plan(model, torch.randn(2, 64, 32), budget=0.6)
        >>> plan.measured.peak <= plan.budget
        True
        >>> report = plan.apply()

    Source:
        The recurrence for chains: Beaumont et al., "Optimal checkpointing for heterogeneous chains", 2019.
    """
    check_model(model, "plan")
    if loss is not None and not callable(loss):
        raise TypeError(f"loss is {type(loss).__name__}; expected a function of what the model returns, or None")
    if progress is not None and not callable(progress):
        raise TypeError(f"progress is {type(progress).__name__}; expected a function of a line, or None")
    tiles = None if tiles is None else list(tiles)
    if tiles is not None and not all(is_count(number) and number > 1 for number in tiles):
        raise ValueError(f"tiles is {tiles!r}; expected whole numbers above 1")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"the model is on {device}, where steps are not measured; expected a CPU or a CUDA device")
    bytes_of(budget, 1, device)
    shown = progress or _shown_in_terminal
    bench = Bench(model, inputs, kwargs, loss, shown)
    try:
        found, reason = _measured(bench, tiles)
        if found is None:
            return one_level(model, bench, budget, reason)
        return fastest(model, bench, found, allowed(budget, found.steps, bench.device))
    finally:
        if progress is None:
            _end_of_progress()


def _measured(bench: Bench, tiles: list[int] | None) -> tuple[Measured | None, str]:
    """What is measured of the layers, or why they cannot be chosen for one by one."""
    try:
        return measured(bench, tiles), ""
    except NotAChain as reason:
        return None, str(reason)


def _shown_in_terminal(line: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[Kplanning: {line}", end="", file=sys.stderr, flush=True)


def _end_of_progress() -> None:
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
