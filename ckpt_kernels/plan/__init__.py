"""The planner: for each layer of a model what to keep, so that a step is the fastest that fits a budget of memory.

    plan = ckpt_kernels.plan(model, batch, budget="12GiB")
    print(plan)
    plan.apply()

`layers` finds the layers of a model. `bench` runs steps of it, in which `marks` tells where a layer begins and ends.
`measure` makes of these the cost of each choice for each layer (`timing` its seconds), a chain of stages (`costs`), and
`solve` the fastest assignment of choices for every amount of memory. `Plan` is the result.
"""

import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .bench import EAGER, LEVELS, Bench, StepCost, is_out_of_memory
from .budget import Budget, DoesNotFit, bytes_of
from .costs import Assignment
from .marks import NotAChain, peak_of
from .measure import Measured, measured
from .plan import Plan, structure_of
from .solve import Solver
from .ways import predicted

__all__ = ["DoesNotFit", "Plan", "plan"]

# Plans that differ in time by less are taken for equally fast, and the one of less memory is taken.
SLACK = 0.005
# How often a plan that turned out above the budget is made anew.
_ATTEMPTS = 4


def plan(
    model: nn.Module,
    *inputs: Any,
    budget: Budget,
    loss: Callable[[Any], Tensor] | None = None,
    progress: Callable[[str], None] | None = None,
    **kwargs: Any,
) -> Plan:
    """The fastest training step of `model(*inputs, **kwargs)` that fits the budget.

    A budget bounds the bytes that a step, forward and backward, makes on the device beside parameters, their gradients,
    optimizer state and inputs, as `memory.peak_bytes` measures them where the gradients are there before.

    For each layer, a member of a `ModuleList` or `Sequential` with a norm and at least two matrices, it chooses one of
    the levels of `convert`, or to leave the layer as it is, or to checkpoint it, by itself or together with others in a
    row; of those in a checkpoint too. Costs are measured in steps of the model on these inputs; the choice is the best
    one by these costs; then a step is measured with it, and where that is above the budget another choice is made.
    The model, its gradients and random numbers stay as they are: steps run on copies that share the parameters' memory.
    Hooks run in these steps too, and what cannot be copied, a lock or an iterator that the model holds, is shared with
    the copies. `Plan.apply` converts the model.

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
        progress: called with a line before each step that is made. By default lines go to a terminal's stderr.

    Returns:
        A `Plan`, which prints as a table.

    Raises:
        DoesNotFit: no choice fits; the error's `least` are the fewest bytes of any.
        MemoryError: a step does not fit into memory at any choice, so that nothing can be measured.
        TypeError, ValueError: the model is no module, or compiled or sharded already, or cannot be copied; the budget
            or the loss is none; the output has no gradient.

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
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; expected a torch.nn.Module")
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise TypeError("model is compiled already; expected one that is not: plan first, then torch.compile")
    if loss is not None and not callable(loss):
        raise TypeError(f"loss is {type(loss).__name__}; expected a function of what the model returns, or None")
    if progress is not None and not callable(progress):
        raise TypeError(f"progress is {type(progress).__name__}; expected a function of a line, or None")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"the model is on {device}, where steps are not measured; expected a CPU or a CUDA device")
    bytes_of(budget, 1, device)
    shown = progress or _shown_in_terminal
    bench = Bench(model, inputs, kwargs, loss, shown)
    try:
        try:
            found = measured(bench)
        except NotAChain as reason:
            return _whole(model, bench, budget, str(reason))
        return _solved(model, bench, found, _allowed(budget, found.steps, bench))
    finally:
        if progress is None:
            _end_of_progress()


def _allowed(budget: Budget, steps: dict[str, StepCost], bench: Bench) -> int | None:
    if EAGER not in steps and isinstance(budget, float) and budget <= 1.0:
        raise ValueError(f"budget is {budget}, of eager's peak, and a step of eager does not fit; expected bytes")
    return bytes_of(budget, steps[EAGER].peak if EAGER in steps else 1, bench.device)


def _solved(model: nn.Module, bench: Bench, found: Measured, budget: int | None) -> Plan:
    solver = Solver(found.stages)
    front = solver.front
    excess = 0
    structure, bound = structure_of(model), _bound(found, solver, budget)
    frontier = list(zip(front.needs.tolist(), front.seconds.tolist(), strict=True))
    for attempt in range(_ATTEMPTS):
        assignment = _best(solver, None if budget is None else budget - excess)
        is_least = assignment is None or attempt == _ATTEMPTS - 1
        if assignment is None or is_least:
            assignment = solver.best(int(front.needs[0]))
            assert assignment is not None
        peak, seconds = predicted(found.stages, assignment)
        made = Plan(
            budget=budget,
            assignment=assignment,
            predicted=StepCost(peak, seconds),
            measured=StepCost(peak, seconds),
            steps=found.steps,
            bound=bound,
            frontier=frontier,
            stages=found.stages,
            layers=found.layers,
            structure=structure,
            shapes=found.shapes,
            _model=[weakref.ref(model)],
        )
        step, eager = _tried(bench, made)
        told = [*found.notes, *([f"costs predicted {excess:,} bytes too few at first"] if excess else [])]
        if budget is None or step.peak <= budget:
            steps = found.steps | ({EAGER: StepCost(found.steps[EAGER].peak, eager)} if EAGER in found.steps else {})
            made = _with(made, measured=step, steps=steps, count=bench.count, note="; ".join(told))
            return _or_eager(made)
        if is_least:
            raise DoesNotFit(budget, step.peak, "; ".join(found.notes))
        excess = max(excess, step.peak - peak)
    raise AssertionError("the last attempt returns or raises")


def _or_eager(made: Plan) -> Plan:
    """The model as it is, where that fits and is faster than the plan: of tiny models the calls are what costs."""
    eager = made.steps.get(EAGER)
    if eager is None or eager.seconds >= made.measured.seconds or eager.peak > (made.budget or eager.peak):
        return made
    told = f"as it is the model is faster than planned ({made.measured.seconds * 1e3:.1f} ms)"
    note = "; ".join(filter(None, (told, made.note)))
    return _with(made, assignment=(), whole="none", predicted=eager, measured=eager, bound=eager.seconds, note=note)


def _with(made: Plan, **changes: Any) -> Plan:
    return replace(made, **changes)


def _best(solver: Solver, budget: int | None) -> Assignment | None:
    """The one of least memory among those that are about as fast as the fastest that fits."""
    needs, seconds = solver.front
    memory = int(needs[-1]) if budget is None else budget
    fastest = solver.front.at(memory)
    enough = needs[seconds <= fastest * (1 + SLACK)]
    return solver.best(int(enough[0])) if len(enough) and int(enough[0]) <= memory else None


def _bound(found: Measured, solver: Solver, budget: int | None) -> float:
    front = Solver(found.stages, optimistic=True).front if solver.is_thinned else solver.front
    return front.at(int(front.needs[-1]) if budget is None else budget)


def _tried(bench: Bench, made: Plan, turns: int = 2) -> tuple[StepCost, float]:
    """A step as the plan has it, and the seconds of one of eager's, timed in turn."""
    twins = {"the plan": bench.twin(made)} | ({EAGER: bench.twin(None)} if EAGER in made.steps else {})
    _, points = bench.step("memory of the plan", twins["the plan"], memory=True)
    peak = peak_of(points)
    if made.budget is not None and peak > made.budget:
        return StepCost(peak, made.predicted.seconds), 0.0
    times: dict[str, list[float]] = {name: [] for name in twins}
    for turn in range(turns):
        for name, twin in twins.items():
            _, timed = bench.step(f"time of {name}, {turn + 1} of {turns}", twin, memory=False)
            times[name].append(timed[-1].seconds - timed[0].seconds)
    return StepCost(peak, min(times["the plan"])), min(times.get(EAGER, [0.0]))


def _whole(model: nn.Module, bench: Bench, budget: Budget, reason: str) -> Plan:
    """One level for all, of a model whose layers cannot be chosen for."""
    bench.names = []
    steps: dict[str, StepCost] = {}
    for level in LEVELS:
        name = EAGER if level == "none" else level
        twin = bench.twin(None if level == "none" else level)
        try:
            _, points = bench.step(f"memory of {name}", twin, memory=True)
            _, timed = bench.step(f"time of {name}", twin, memory=False)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            continue
        steps[name] = StepCost(peak_of(points), timed[-1].seconds - timed[0].seconds)
    if not steps:
        raise MemoryError("a step does not fit at any level")
    allowed = _allowed(budget, steps, bench)
    fitting = {name: step for name, step in steps.items() if allowed is None or step.peak <= allowed}
    if not fitting:
        raise DoesNotFit(allowed or 0, min(step.peak for step in steps.values()), reason)
    best = min(fitting, key=lambda name: (fitting[name].seconds, fitting[name].peak))
    return Plan(
        budget=allowed,
        assignment=(),
        predicted=fitting[best],
        measured=fitting[best],
        steps=steps,
        bound=fitting[best].seconds,
        frontier=[],
        stages=[],
        layers=[],
        structure=structure_of(model),
        shapes={},
        whole="none" if best == EAGER else best,
        note=reason,
        count=bench.count,
        _model=[weakref.ref(model)],
    )


def _shown_in_terminal(line: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[Kplanning: {line}", end="", file=sys.stderr, flush=True)


def _end_of_progress() -> None:
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
