"""From measured costs to a plan: the best by these costs, then tried in steps, for what it takes and against others."""

import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..levels import NONE, OF_LAYERS, OF_MODULES, Policy
from .bench import EAGER, Bench, StepCost, is_out_of_memory
from .budget import Budget, DoesNotFit, bytes_of, fraction_of
from .costs import FIXED, Assignment, Checkpoint, StageAt
from .measure import Measured
from .plan import Plan, structure_of
from .solve import Solver
from .trials import called
from .ways import predicted

# Plans that differ in time by less are taken for equally fast, and the one of less memory is taken.
SLACK = 0.005
# How often a plan that turned out above the budget is made anew.
_ATTEMPTS = 4
# How often those that fit are timed, in turn.
_TURNS = 2


def allowed(budget: Budget, steps: dict[str, StepCost], device: torch.device) -> int | None:
    """The budget in bytes.

    Raises:
        ValueError: it is a part of eager's peak, and a step of eager does not fit into memory.
    """
    if EAGER not in steps and fraction_of(budget) is not None:
        raise ValueError(f"budget is {budget}, of eager's peak, and a step of eager does not fit; expected bytes")
    return bytes_of(budget, steps[EAGER].peak if EAGER in steps else 1, device)


def fastest(model: nn.Module, bench: Bench, found: Measured, budget: int | None) -> Plan:
    """The plan whose step is the fastest that fits, by costs first and then by the clock.

    Raises:
        DoesNotFit: none does.
    """
    solver = Solver(found.stages)
    front = solver.front
    frontier = list(zip(front.needs.tolist(), front.seconds.tolist(), strict=True))
    plans = _Plans(model, bench.given, found, budget, _bound(found, solver, budget), frontier)
    excess = 0
    for attempt in range(_ATTEMPTS):
        assignment = _best(solver, None if budget is None else budget - excess)
        is_least = assignment is None or attempt == _ATTEMPTS - 1
        if assignment is None or is_least:
            assignment = solver.best(int(front.needs[0]))
            assert assignment is not None
        made = plans.of(assignment)
        peak = bench.peak("memory of the plan", bench.twin(made))
        if budget is None or peak <= budget:
            told = [*found.notes, *([f"costs predicted {excess:,} bytes too few at first"] if excess else [])]
            made = replace(made, measured=replace(made.measured, peak=peak), note="; ".join(told))
            return replace(_raced(bench, made, _rivals(plans, made)), count=bench.count)
        if is_least:
            raise DoesNotFit(budget, peak, "; ".join(found.notes))
        excess = max(excess, peak - made.predicted.peak)
    raise AssertionError("the last attempt returns or raises")


def _best(solver: Solver, budget: int | None) -> Assignment | None:
    """The one of least memory among those that are about as fast as the fastest that fits."""
    needs, seconds = solver.front
    memory = int(needs[-1]) if budget is None else budget
    least = solver.front.at(memory)
    enough = needs[seconds <= least * (1 + SLACK)]
    return solver.best(int(enough[0])) if len(enough) and int(enough[0]) <= memory else None


def _bound(found: Measured, solver: Solver, budget: int | None) -> float:
    front = Solver(found.stages, optimistic=True).front if solver.is_thinned else solver.front
    return front.at(int(front.needs[-1]) if budget is None else budget)


class _Plans:
    """Makes plans of assignments, of what they have in common."""

    def __init__(
        self,
        model: nn.Module,
        given: tuple[int, ...],
        found: Measured,
        budget: int | None,
        bound: float,
        frontier: list[tuple[int, float]],
    ) -> None:
        self.found = found
        self.budget = budget
        self._common: dict[str, Any] = {
            "bound": bound,
            "frontier": frontier,
            "structure": structure_of(model),
            "given": given,
            "_model": [weakref.ref(model)],
        }

    def of(self, assignment: Assignment) -> Plan:
        """With what is predicted of it in place of what is measured."""
        found = self.found
        step = StepCost(*predicted(found.stages, assignment))
        return Plan(
            budget=self.budget,
            assignment=assignment,
            predicted=step,
            measured=step,
            steps=found.steps,
            stages=found.stages,
            layers=found.layers,
            shapes=found.shapes,
            **self._common,
        )

    def at_one(self, choice: str) -> Plan | None:
        """All layers at one choice, with the peak that was measured; None where a layer has better ones."""
        parts: list[StageAt | Checkpoint] = []
        policy = Policy.of(choice, OF_MODULES, "choice")
        for index, stage in enumerate(self.found.stages):
            is_fixed = FIXED in stage.costs
            at = StageAt(index, FIXED if is_fixed else str(policy.inside()))
            parts.append(Checkpoint((at,)) if policy.is_checkpoint and not is_fixed else at)
        try:
            made = self.of(tuple(parts))
        except ValueError:
            return None
        return replace(made, measured=replace(made.measured, peak=self.found.steps[choice].peak))


def _rivals(plans: _Plans, made: Plan) -> dict[str, Plan]:
    """What the plan is held against: the model as it is, and of the choices that fit the one that was the fastest with
    all layers at it."""
    steps, budget = plans.found.steps, plans.budget
    fitting = [name for name, step in steps.items() if budget is None or step.peak <= budget]
    rivals = {choice: plan for choice in fitting if choice != EAGER and (plan := plans.at_one(choice)) is not None}
    quickest = min(rivals, key=lambda choice: steps[choice].seconds, default=None)
    if quickest is None or rivals[quickest].assignment == made.assignment:
        return {}
    return {quickest: rivals[quickest]}


def _raced(bench: Bench, made: Plan, rivals: dict[str, Plan]) -> Plan:
    """The fastest by the clock, of the plan, others that fit, and, where that fits, the model as it is."""
    plans = {"the plan": made, **{f"all at {name}": plan for name, plan in rivals.items()}}
    twins = {name: bench.twin(plan) for name, plan in plans.items()}
    if EAGER in made.steps:
        twins[EAGER] = bench.twin(None)
    times: dict[str, list[float]] = {name: [] for name in twins}
    for turn in range(_TURNS):
        for name, twin in twins.items():
            times[name].append(bench.seconds(f"time of {name}, {turn + 1} of {_TURNS}", twin))
    seconds = {name: min(found) for name, found in times.items()}
    steps = made.steps
    if EAGER in steps:
        steps = steps | {EAGER: StepCost(steps[EAGER].peak, seconds[EAGER])}
    winner = min(plans, key=seconds.__getitem__)
    told = f"{winner} is faster than planned ({seconds['the plan'] * 1e3:.1f} ms)" if winner != "the plan" else ""
    won = replace(
        plans[winner],
        measured=StepCost(plans[winner].measured.peak, seconds[winner]),
        steps=steps,
        note="; ".join(filter(None, (told, made.note))),
    )
    return _or_eager(won)


def _or_eager(made: Plan) -> Plan:
    """The model as it is, where that fits and is faster than the plan: of tiny models the calls are what costs."""
    eager = made.steps.get(EAGER)
    if eager is None or eager.seconds >= made.measured.seconds or eager.peak > (made.budget or eager.peak):
        return made
    told = f"as it is the model is faster than planned ({made.measured.seconds * 1e3:.1f} ms)"
    note = "; ".join(filter(None, (told, made.note)))
    return replace(made, assignment=(), whole=NONE, predicted=eager, measured=eager, bound=eager.seconds, note=note)


def one_level(model: nn.Module, bench: Bench, budget: Budget, reason: str) -> Plan:
    """One level for all, of a model whose layers cannot be chosen for."""
    bench.names = []
    steps: dict[str, StepCost] = {}
    for level in OF_LAYERS:
        name = called(level)
        twin = bench.twin(None if level == NONE else level)
        try:
            peak = bench.peak(f"memory of {name}", twin)
            steps[name] = StepCost(peak, bench.seconds(f"time of {name}", twin))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
    if not steps:
        raise MemoryError("a step does not fit at any level")
    most = allowed(budget, steps, bench.device)
    fitting = {name: step for name, step in steps.items() if most is None or step.peak <= most}
    if not fitting:
        raise DoesNotFit(most or 0, min(step.peak for step in steps.values()), reason)
    best = min(fitting, key=lambda name: (fitting[name].seconds, fitting[name].peak))
    return Plan(
        budget=most,
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
        given=bench.given,
        whole=NONE if best == EAGER else best,
        note=reason,
        count=bench.count,
        _model=[weakref.ref(model)],
    )
