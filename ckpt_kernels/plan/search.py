"""Turns measured costs into a plan: solves for the best assignment, then runs a step to check its memory and time."""

import operator
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..levels import NONE, OF_LAYERS, OF_MODULES, Policy
from .bench import EAGER, Bench, StepCost, is_out_of_memory
from .budget import Budget, DoesNotFit, bytes_of, fraction_of
from .chain import predicted
from .costs import FIXED, Assignment, Checkpoint, StageAt
from .measure import Measurements
from .offloading import Solutions
from .plan import ModelReference, Plan, structure_of
from .trials import step_name

# Plans whose times differ by less than this fraction count as equally fast, and the one of less memory wins.
SLACK = 0.005
# How many plans are tried when measured peaks exceed the budget.
_ATTEMPTS = 3
# How many more plans are tried after these.
_OTHERS = 6
# How many times each candidate that fits is timed, in turn with the others.
_TURNS = 2


def budget_bytes(budget: Budget, steps: dict[str, StepCost], device: torch.device) -> int | None:
    """Return the budget in bytes.

    Raises:
        ValueError: the budget is a fraction of eager's peak, and a step of eager does not fit into memory.
    """
    if EAGER not in steps and fraction_of(budget) is not None:
        raise ValueError(f"budget is {budget}, of eager's peak, and a step of eager does not fit; expected bytes")
    return bytes_of(budget, steps[EAGER].peak if EAGER in steps else 1, device)


def fastest(model: nn.Module, bench: Bench, measurements: Measurements, budget: int | None) -> Plan:
    """Return the plan of the fastest step that fits, by predicted costs first and then by measured times.

    Raises:
        DoesNotFit: no plan fits.
    """
    solver = Solutions(measurements.stages)
    front = solver.front
    frontier = list(zip(front.needs.tolist(), front.seconds.tolist(), strict=True))
    plans = _Plans(model, bench.input_shape, measurements, budget, _bound(measurements, solver, budget), frontier)
    notes = measurements.notes
    errors = [0]
    peaks: dict[Assignment, int] = {}
    for assignment in _candidates(solver, budget, errors):
        if assignment in peaks:
            continue
        plan = plans.of(assignment)
        peaks[assignment] = peak = bench.peak("memory of the plan", bench.twin(plan))
        if budget is None or peak <= budget:
            if max(errors):
                notes = [*notes, f"costs predicted {max(errors):,} bytes too few at first"]
            plan = replace(plan, measured=replace(plan.measured, peak=peak), note="; ".join(notes))
            return replace(_race(bench, plan, _rivals(plans, plan)), count=bench.count)
        errors.append(peak - plan.predicted.peak)
    for rival in _rivals(plans, plan).values():
        return replace(_race(bench, rival, {}), count=bench.count)
    assert budget is not None
    least = min(*peaks.values(), *(step.peak for step in measurements.steps.values()))
    raise DoesNotFit(budget, least, "; ".join(notes))


def _candidates(solver: Solutions, budget: int | None, errors: Sequence[int]) -> Iterator[Assignment]:
    """The assignments to try in turn, until the measured peak of one is within the budget.

    First the fastest within the budget less the largest of `errors`, by which predictions fell short so far. Errors
    differ, so then others, from the fastest that should fit to the leanest.
    """
    for _ in range(_ATTEMPTS):
        best = _best(solver, None if budget is None else budget - max(errors))
        if best is None:
            break
        yield best
    needs = solver.front.needs.tolist()
    within = needs if budget is None else [need for need in needs if need <= budget]
    others = needs[: max(_OTHERS, len(within))]
    step = max(1, (len(others) - 1) / (_OTHERS - 1))
    for place in range(min(_OTHERS, len(others))):
        assignment = solver.best(others[len(others) - 1 - round(place * step)])
        assert assignment is not None
        yield assignment


def _best(solver: Solutions, budget: int | None) -> Assignment | None:
    """Return the assignment of least memory among those within `SLACK` of the fastest that fits; None if none fits."""
    needs, seconds = solver.front
    memory = int(needs[-1]) if budget is None else budget
    least = solver.front.at(memory)
    enough = needs[seconds <= least * (1 + SLACK)]
    return solver.best(int(enough[0])) if len(enough) and int(enough[0]) <= memory else None


def _bound(measurements: Measurements, solver: Solutions, budget: int | None) -> float:
    """Return a lower bound on the seconds of every assignment within the budget."""
    front = Solutions(measurements.stages, optimistic=True).front if solver.is_thinned else solver.front
    return front.at(int(front.needs[-1]) if budget is None else budget)


class _Plans:
    """Makes plans from assignments; all plans share the measurements and the budget."""

    def __init__(
        self,
        model: nn.Module,
        input_shape: tuple[int, ...],
        measurements: Measurements,
        budget: int | None,
        bound: float,
        frontier: list[tuple[int, float]],
    ) -> None:
        self.measurements = measurements
        self.budget = budget
        self._common: dict[str, Any] = {
            "bound": bound,
            "frontier": frontier,
            "structure": structure_of(model),
            "given": input_shape,
            "_model": ModelReference(model),
        }

    def of(self, assignment: Assignment) -> Plan:
        """Return a plan whose `measured` is the predicted cost until the plan is run."""
        measurements = self.measurements
        step = StepCost(*predicted(measurements.stages, assignment))
        return Plan(
            budget=self.budget,
            assignment=assignment,
            predicted=step,
            measured=step,
            steps=measurements.steps,
            stages=measurements.stages,
            layers=measurements.layers,
            shapes=measurements.shapes,
            **self._common,
        )

    def at_one(self, choice: str) -> Plan | None:
        """Return a plan with all layers at one choice and its measured peak; None if a layer lacks that choice."""
        parts: list[StageAt | Checkpoint] = []
        policy = Policy.of(choice, OF_MODULES, "choice")
        for index, stage in enumerate(self.measurements.stages):
            is_fixed = FIXED in stage.costs
            at = StageAt(index, FIXED if is_fixed else str(policy.inside()))
            parts.append(Checkpoint((at,)) if policy.is_checkpoint and not is_fixed else at)
        try:
            plan = self.of(tuple(parts))
        except ValueError:
            return None
        return replace(plan, measured=replace(plan.measured, peak=self.measurements.steps[choice].peak))


def _rivals(plans: _Plans, plan: Plan) -> dict[str, Plan]:
    """Return the fastest plan that fits and has all layers at one choice, unless that is `plan` itself."""
    steps, budget = plans.measurements.steps, plans.budget
    fitting = [name for name, step in steps.items() if budget is None or step.peak <= budget]
    rivals = {choice: rival for choice in fitting if choice != EAGER and (rival := plans.at_one(choice)) is not None}
    quickest = min(rivals, key=lambda choice: steps[choice].seconds, default=None)
    if quickest is None or rivals[quickest].assignment == plan.assignment:
        return {}
    return {quickest: rivals[quickest]}


def _race(bench: Bench, planned: Plan, rivals: dict[str, Plan]) -> Plan:
    """Time the plan, the rivals, and the model as it is.

    A rival replaces the plan only if it was faster in every turn: one timed step is noisy, while the plan's costs come
    from many.
    """
    plans = {"the plan": planned, **{f"all layers at {name!r}": plan for name, plan in rivals.items()}}
    twins = {name: bench.twin(plan) for name, plan in plans.items()}
    if EAGER in planned.steps:
        twins[EAGER] = bench.twin(None)
    steps = planned.steps
    fitting = {name for name in twins if name != EAGER or planned.budget is None or steps[EAGER].peak <= planned.budget}
    times: dict[str, list[float]] = {name: [] for name in twins}
    running = list(twins)
    for turn in range(_TURNS):
        for name in running:
            times[name].append(bench.seconds(f"time of {name}, {turn + 1} of {_TURNS}", twins[name]))
        # A rival that was slower once cannot win any more, nor can a model that does not fit as it is.
        running = [name for name in twins if name in fitting and min(times[name]) < min(times["the plan"])]
        running = ["the plan", *running] if running else []
    seconds = {name: min(own) for name, own in times.items()}
    if EAGER in steps:
        steps = steps | {EAGER: StepCost(steps[EAGER].peak, seconds[EAGER])}
    faster = [name for name in fitting if all(map(operator.lt, times[name], times["the plan"]))]
    winner = min(faster, key=seconds.__getitem__, default="the plan")
    instead = f"faster than the plan ({seconds['the plan'] * 1e3:.1f} ms)"
    if winner == EAGER:
        # In tiny models the overhead of calls outweighs the gain of fused kernels.
        return _unconverted(replace(planned, steps=steps), f"as it is the model is {instead}")
    return replace(
        plans[winner],
        measured=StepCost(plans[winner].measured.peak, seconds[winner]),
        steps=steps,
        note="; ".join(filter(None, ("" if winner == "the plan" else f"{winner} are {instead}", planned.note))),
    )


def _unconverted(plan: Plan, reason: str) -> Plan:
    """Return a plan that leaves the model as it is."""
    eager = plan.steps[EAGER]
    note = "; ".join(filter(None, (reason, plan.note)))
    return replace(plan, assignment=(), whole=NONE, predicted=eager, measured=eager, bound=eager.seconds, note=note)


def one_level(model: nn.Module, bench: Bench, budget: Budget, reason: str) -> Plan:
    """Return the fastest plan with one level for the whole model.

    Args:
        reason: why the layers cannot be planned one by one; the note of the plan.
    """
    bench.names = []
    steps: dict[str, StepCost] = {}
    for level in OF_LAYERS:
        name = step_name(level)
        twin = bench.twin(None if level == NONE else level)
        try:
            peak = bench.peak(f"memory of {name}", twin)
            steps[name] = StepCost(peak, bench.seconds(f"time of {name}", twin))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
    if not steps:
        raise MemoryError("a step does not fit at any level")
    limit = budget_bytes(budget, steps, bench.device)
    fitting = {name: step for name, step in steps.items() if limit is None or step.peak <= limit}
    if not fitting:
        raise DoesNotFit(limit or 0, min(step.peak for step in steps.values()), reason)
    best = min(fitting, key=lambda name: (fitting[name].seconds, fitting[name].peak))
    return Plan(
        budget=limit,
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
        given=bench.input_shape,
        whole=NONE if best == EAGER else best,
        note=reason,
        count=bench.count,
        _model=ModelReference(model),
    )
