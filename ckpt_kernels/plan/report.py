"""Prints a plan as a table by layer, and draws time against peak memory."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from ..levels import NONE, OF_MODULES, Policy
from ..memory.table import size, spanned
from .costs import FIXED, Assignment, StageAt, stages_of

if TYPE_CHECKING:
    import pathlib

    from .plan import Plan

COLORS = {
    "eager": "#3c3c3c",
    "block": "#8fc3e3",
    "output": "#3182bd",
    "all": "#08306b",
    "layer": "#00796b",
    "checkpoint": "#e6550d",
}


# Differences of times below this fraction are not worth a line.
_NOISE = 0.005


class Row(NamedTuple):
    """Adjacent layers at one choice; bytes and seconds are per layer."""

    layers: list[str]
    kind: str
    choice: str
    kept: int
    transient: int
    added: float


def rows_of(plan: "Plan") -> list[Row]:
    """Return the rows of the table in the order of the forward pass; adjacent layers of equal figures share a row."""
    rows: list[Row] = []
    for row in _rows(plan, plan.assignment, "", 0):
        # Rows without a kind are code between layers, and are never merged.
        is_alike = rows and rows[-1]._replace(layers=row.layers, added=row.added) == row
        if is_alike and row.kind and abs(rows[-1].added - row.added) < 1e-9:
            rows[-1] = rows[-1]._replace(layers=[*rows[-1].layers, *row.layers])
        else:
            rows.append(row)
    return rows


def _rows(plan: "Plan", parts: Assignment, around: str, runs: int) -> Iterator[Row]:
    """Yield a row for each stage; `around` names the `runs` checkpoints around the parts."""
    for part in parts:
        if isinstance(part, StageAt):
            stage, cost = plan.stages[part.stage], plan.stages[part.stage].costs[part.level]
            fastest = min(other.seconds for other in stage.costs.values())
            kept = 0 if around else cost.kept
            added = cost.seconds - fastest
            # Each checkpoint around the stage runs its forward pass once more.
            added += runs * stage.checkpointed.forward if stage.checkpointed else 0.0
            level = "as it is" if part.level in (FIXED, NONE) else part.level
            yield Row([stage.name], stage.kind, around + level, kept, cost.backward_peak, added)
        else:
            layers = len(stages_of(part.inside))
            name = f"checkpoint of {layers}, " if layers > 1 else "checkpoint, "
            yield from _rows(plan, part.inside, around + name, runs + 1)


def text(plan: "Plan") -> str:
    """Return the table, the totals, and the costs of neighbouring plans."""
    eager = plan.steps.get("eager")
    lines: list[str] = []
    if plan.whole is not None:
        lines.append(f"one level for the whole model, {plan.whole!r}: {plan.note}")
    else:
        cells: list[tuple[str, ...]] = [("layer", "", "", "choice", "keeps", "backward takes", "time added")]
        for row in rows_of(plan):
            count = f"x {len(row.layers)}" if len(row.layers) > 1 else ""
            added = f"{row.added * 1e3:.2f} ms"
            cells.append((spanned(row.layers), row.kind, count, row.choice, size(row.kept), size(row.transient), added))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        rule = "-" * (sum(widths) + 2 * len(widths) - 2)
        for index, row_cells in enumerate(cells):
            aligned = [
                c.ljust(w) if i < 4 else c.rjust(w) for i, (c, w) in enumerate(zip(row_cells, widths, strict=True))
            ]
            lines += ["  ".join(aligned).rstrip(), *([rule] if index == 0 else [])]
        lines.append(rule)
    if plan.budget is not None:
        of = f" ({plan.budget / max(eager.peak, 1):.2f} of eager's peak)" if eager else ""
        lines.append(f"budget          {size(plan.budget)}{of}")
    for name, unit in (("peak", "peak"), ("time of a step", "seconds")):
        predicted, measured = getattr(plan.predicted, unit), getattr(plan.measured, unit)
        whole = getattr(eager, unit) if eager else 0
        of = f", {measured / whole:.2f} of eager's {_formatted(whole)}" if whole else ""
        lines.append(f"{name:15} {_formatted(measured)}{of}; predicted {_formatted(predicted)}")
    if moved := sum(plan.stages[at.stage].costs[at.level].offloaded for at in stages_of(plan.assignment)):
        lines.append(f"in host memory  {size(moved)}")
    lines += _neighbours(plan)
    if 0 < plan.bound < plan.predicted.seconds * (1 - _NOISE):
        lines.append(f"no plan within the budget can be faster than {plan.bound * 1e3:.1f} ms by these costs")
    if plan.note and plan.whole is None:
        lines.append(plan.note)
    return "\n".join(lines)


def _formatted(value: float) -> str:
    """Format bytes, an int, or seconds, a float."""
    return size(value) if isinstance(value, int) else f"{value * 1e3:.1f} ms"


def _neighbours(plan: "Plan") -> Iterator[str]:
    """Yield a line for the next plan of less memory, and one for the next plan of more."""
    peak, seconds = plan.predicted.peak, plan.predicted.seconds
    # A plan that won by measured time may not be on the predicted frontier. Points of less memory and less time are
    # then no trade-off and are not shown.
    less = [label for label in plan.frontier if label[0] < 0.98 * peak and label[1] > seconds]
    more = [label for label in plan.frontier if label[0] > peak and label[1] < 0.99 * seconds]
    for word, label in (("less", less[-1] if less else None), ("more", more[0] if more else None)):
        if label is not None:
            change = label[1] / seconds - 1
            yield f"with {word} memory  {size(label[0])} would take {change:+.1%} time"


def _marker(policy: Policy | None) -> str:
    """The marker of all layers at one choice: a triangle with offload, a square with tiles, else a circle."""
    if policy is None or not (policy.tiles or policy.is_offloaded):
        return "o"
    return "^" if policy.is_offloaded else "s"


def draw(plan: "Plan", path: "str | pathlib.Path") -> None:
    """Draw time against peak memory, both as fractions of eager's. Needs matplotlib."""
    from matplotlib.figure import Figure

    # If eager does not fit into memory, the plan itself is the unit.
    eager = plan.steps.get("eager", plan.measured)
    unit = "eager" if "eager" in plan.steps else "the plan"
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axis = figure.subplots()
    if plan.frontier:
        needs = [need / eager.peak for need, _ in plan.frontier]
        seconds = [seconds / eager.seconds for _, seconds in plan.frontier]
        axis.step(needs, seconds, where="post", color="#555555", linewidth=1.5, label="best plans, predicted")
    for name, step in plan.steps.items():
        x, y = step.peak / eager.peak, step.seconds / eager.seconds
        label = "eager" if name == "eager" else f"all layers at {name!r}"
        policy = Policy.read(name, OF_MODULES)
        color, marker = COLORS[policy.level if policy else name], _marker(policy)
        axis.plot(x, y, marker, color=color, markersize=9, label=label)
    measured = plan.measured
    title = f"{measured.peak / eager.peak:.2f} of {unit}'s peak in {measured.seconds / eager.seconds:.2f} of its time"
    axis.plot(
        measured.peak / eager.peak,
        measured.seconds / eager.seconds,
        "*",
        color="#d62728",
        markersize=18,
        label="this plan",
    )
    if plan.budget is not None:
        axis.axvline(plan.budget / eager.peak, color="#d62728", linestyle="--", linewidth=1, label="budget")
    axis.set_xlabel(f"peak memory of a step, of {unit}'s {size(eager.peak)}")
    axis.set_ylabel(f"time of a step, of {unit}'s {eager.seconds * 1e3:.0f} ms")
    axis.set_title(f"The plan: {title}")
    axis.set_xlim(left=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    figure.savefig(path, dpi=110)
