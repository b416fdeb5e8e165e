"""A plan as a person reads it: a table by layer, and a picture of time against peak."""

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


class Row(NamedTuple):
    """Layers in a row at one choice; bytes and seconds are of each."""

    layers: list[str]
    kind: str
    choice: str
    kept: int
    transient: int
    added: float


def rows_of(plan: "Plan") -> list[Row]:
    """In the order of the forward pass; layers in a row that are alike in all once."""
    found: list[Row] = []
    for row in _rows(plan, plan.assignment, "", 0):
        # Those between layers stand for themselves.
        if found and row.kind and found[-1][1:5] == row[1:5] and abs(found[-1].added - row.added) < 1e-9:
            found[-1] = found[-1]._replace(layers=[*found[-1].layers, *row.layers])
        else:
            found.append(row)
    return found


def _rows(plan: "Plan", parts: Assignment, around: str, runs: int) -> Iterator[Row]:
    for part in parts:
        if isinstance(part, StageAt):
            stage, cost = plan.stages[part.stage], plan.stages[part.stage].costs[part.level]
            fastest = min(other.seconds for other in stage.costs.values())
            kept = 0 if around else cost.kept
            added = cost.seconds - fastest
            # Once more for each run that the stage is in.
            added += runs * stage.checkpointed.forward if stage.checkpointed else 0.0
            level = "as it is" if part.level in (FIXED, NONE) else part.level
            yield Row([stage.name], stage.kind, around + level, kept, cost.backward_peak, added)
        else:
            layers = len(stages_of(part.inside))
            name = f"checkpoint of {layers}, " if layers > 1 else "checkpoint, "
            yield from _rows(plan, part.inside, around + name, runs + 1)


def text(plan: "Plan") -> str:
    """The table, with totals, and what other plans would cost."""
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
        predicted, found = getattr(plan.predicted, unit), getattr(plan.measured, unit)
        whole = getattr(eager, unit) if eager else 0
        of = f", {found / whole:.2f} of eager's {_shown(whole)}" if whole else ""
        lines.append(f"{name:15} {_shown(found)}{of}; predicted {_shown(predicted)}")
    lines += _beside(plan)
    if plan.bound < plan.predicted.seconds:
        lines.append(f"no plan within the budget can be faster than {plan.bound * 1e3:.1f} ms by these costs")
    if plan.note and plan.whole is None:
        lines.append(plan.note)
    return "\n".join(lines)


def _shown(value: float) -> str:
    """Bytes, or seconds."""
    return size(value) if isinstance(value, int) else f"{value * 1e3:.1f} ms"


def _beside(plan: "Plan") -> Iterator[str]:
    """The next plans of less memory and of more."""
    peak, seconds = plan.predicted.peak, plan.predicted.seconds
    # A plan that was taken by the clock may have other seconds than were predicted: plans of less memory and less time
    # are none to be told beside it.
    less = [label for label in plan.frontier if label[0] < 0.98 * peak and label[1] > seconds]
    more = [label for label in plan.frontier if label[0] > peak and label[1] < 0.99 * seconds]
    for word, label in (("less", less[-1] if less else None), ("more", more[0] if more else None)):
        if label is not None:
            change = label[1] / seconds - 1
            yield f"with {word} memory  {size(label[0])} would take {change:+.1%} time"


def draw(plan: "Plan", path: "str | pathlib.Path") -> None:
    """Time against peak, both of eager's. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # Where eager does not fit, the plan itself is the unit.
    eager = plan.steps.get("eager", plan.measured)
    unit = "eager" if "eager" in plan.steps else "the plan"
    figure, axis = plt.subplots(figsize=(9, 5.5), layout="constrained")
    if plan.frontier:
        needs = [need / eager.peak for need, _ in plan.frontier]
        seconds = [seconds / eager.seconds for _, seconds in plan.frontier]
        axis.step(needs, seconds, where="post", color="#555555", linewidth=1.5, label="best plans, predicted")
    for name, step in plan.steps.items():
        x, y = step.peak / eager.peak, step.seconds / eager.seconds
        label = "eager" if name == "eager" else f"all layers at {name!r}"
        policy = Policy.read(name, OF_MODULES)
        color, marker = COLORS[policy.level if policy else name], "s" if policy and policy.tiles else "o"
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
    plt.close(figure)
