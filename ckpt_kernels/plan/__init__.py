"""The planner chooses a recompute level for each layer so that a training step is the fastest within a memory budget.

    plan = ckpt_kernels.plan(model, batch, budget="12GiB")
    print(plan)
    plan.apply()

`convert.layers` finds the layers of a model. `bench` runs training steps, and `marks` records where each layer begins
and ends. `measure` turns these steps into the cost of each choice for each layer (`trials` measures memory, `timing`
measures seconds); the costs form a chain of stages (`stages`, `costs`). `chain` predicts the cost of an assignment of
choices to stages, and `solve` finds the fastest assignment for every amount of memory, with the Pareto fronts of
`fronts`; `offloading` solves chains whose layers may keep tensors in host memory. `search` runs the best candidates,
and the same level for all layers beside them. `Plan` is the result.
"""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import is_count
from ..convert.swap import NotSwapped
from ..model_argument import check_model
from .bench import Bench
from .budget import Budget, DoesNotFit, bytes_of
from .marks import NotAChain
from .measure import Measurements, measure_choices
from .plan import Plan
from .search import budget_bytes, fastest, one_level

__all__ = ["DoesNotFit", "Plan", "plan"]


def plan(
    model: nn.Module,
    *inputs: Any,
    budget: Budget,
    loss: Callable[[Any], Tensor] | None = None,
    tiles: Iterable[int] | None = None,
    offload: bool = False,
    progress: Callable[[str], None] | None = None,
    **kwargs: Any,
) -> Plan:
    """Find the fastest training step of `model(*inputs, **kwargs)` that fits the budget.

    The budget bounds the bytes that a forward and backward pass allocates on the device beside parameters, gradients,
    optimizer state and inputs. `memory.peak_bytes` reports the same figure for a model whose gradients exist already.

    A layer is a member of a `ModuleList` or `Sequential` that holds a norm and at least two matrices. The planner gives
    each layer one of the levels of `convert` (with MLPs in tiles or without), leaves the layer as it is, or puts it in
    a checkpoint, alone or with the layers next to it. Layers inside a checkpoint get a level too.

    Costs are measured in steps of the model on these inputs. The plan that is best by these costs is then run; if its
    peak exceeds the budget, the planner chooses again. The steps run on copies that share the parameters' memory, so
    the model, its gradients, the global generators of random numbers, and generators that modules hold do not change.
    Hooks of the model run in these steps. Objects that cannot be copied, such as a lock or an iterator, are shared with
    the copies. `Plan.apply` converts the model.

    A layer may be checkpointed only if a second run in one of the steps saved bitwise equal tensors and the layer wrote
    to none of its own attributes. If layers are called more than once a step or skipped at random, the plan has one
    level for the whole model.

    Args:
        model: a module, converted or not, whose layers run one after the other.
        inputs, kwargs: the model's arguments, of the size that the budget is for.
        budget: bytes; a size such as "12GiB"; a float up to 1, a fraction of eager's peak; "device", 95 % of the free
            memory of the GPU (call `plan` after the first optimizer step, which allocates the optimizer's state); or
            None, no limit.
        loss: computes the loss from the model's output. The default is the output's own `loss`, or the sum of the
            output's tensors.
        tiles: numbers of tiles that MLPs may split their tokens into, at the levels that support tiles. A number is
            tried if each tile has at least 256 tokens (2,048 on a GPU), and offered to a layer if it lowers the layer's
            peak. None tries the largest such number of 8, 4 and 2; () tries none.
        offload: whether layers may also keep their tensors in host memory, at the levels "output", "all" and "layer"
            (see `offload.offload`). Host memory has no budget. On a CPU, where this is simulated, such a plan saves no
            memory.
        progress: called with a line before each step. By default the lines go to stderr if that is a terminal.

    Returns:
        A `Plan`, which prints as a table.

    Raises:
        DoesNotFit: no choice fits; the error's `least` is the smallest peak of any choice.
        MemoryError: a step runs out of memory at every choice, so nothing can be measured.
        TypeError, ValueError: the model is not a module, is compiled or sharded already, or cannot be copied; the
            budget or the loss is not valid; a number of tiles is not a whole number above 1; the output has no
            gradient.

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
    if tiles is not None and (isinstance(tiles, str) or not isinstance(tiles, Iterable)):
        raise TypeError(f"tiles is {tiles!r}; expected several whole numbers above 1, such as (2, 4), or None")
    tiles = None if tiles is None else list(tiles)
    if tiles is not None and not all(is_count(number) and number > 1 for number in tiles):
        raise ValueError(f"tiles is {tiles!r}; expected whole numbers above 1")
    if not isinstance(offload, bool):
        raise TypeError(f"offload is {offload!r}; expected True or False")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"the model is on {device}, where steps are not measured; expected a CPU or a CUDA device")
    bytes_of(budget, 1, device)
    try:
        with torch.inference_mode(False), _without_gradients(model):
            bench = Bench(model, inputs, kwargs, loss, progress or _print_progress)
            measurements, reason = _measurements(bench, tiles, offload)
            if measurements is None:
                reason += "; without layers of their own none is offloaded" if offload else ""
                return one_level(model, bench, budget, reason)
            return fastest(model, bench, measurements, budget_bytes(budget, measurements.steps, bench.device))
    finally:
        if progress is None:
            _clear_progress()


@contextlib.contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """Set the model's gradients aside, and restore them at the end.

    A twin may reach a parameter of the model itself, such as through a weak reference to a module. The backward pass of
    the twin then accumulates a gradient on that parameter.
    """
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _measurements(bench: Bench, tiles: list[int] | None, offload: bool) -> tuple[Measurements | None, str]:
    """Return the measured costs, or None and the reason why the layers cannot be planned one by one."""
    try:
        return measure_choices(bench, tiles, offload), ""
    except NotAChain as reason:
        return None, str(reason)
    except NotSwapped as reason:
        return None, f"a layer cannot be marked: {reason}"


def _print_progress(line: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[Kplanning: {line}", end="", file=sys.stderr, flush=True)


def _clear_progress() -> None:
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
