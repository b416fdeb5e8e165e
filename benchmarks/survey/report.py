"""Reports a survey as JSON, as Markdown, in the terminal and as a picture."""

import json
import pathlib
import statistics
from collections.abc import Iterable
from typing import Any

from rich.table import Table

from ckpt_kernels import palette

from .. import figures
from .measure import CHECKPOINTED, LEVELS

Found = dict[str, Any]

COLUMNS = ["architecture", "class", "eager, KiB", *LEVELS, *CHECKPOINTED, "replaced", "left", "found"]
SUMMARY = ["library", "models", "not run", "raised", "wrong numbers", "changed state", *LEVELS]


def phases(found: Found) -> dict[str, Found]:
    """The results of the phases after "eager", by phase."""
    return {name: found["phases"][name] for name in (*LEVELS, *CHECKPOINTED) if name in found["phases"]}


def runs(found: Found) -> bool:
    """Whether the unconverted model was built and trained."""
    return "kept" in found["phases"].get("eager", {})


def raised(found: Found) -> list[str]:
    return [f"{name}: {phase['raised']}" for name, phase in phases(found).items() if "raised" in phase]


def wrong(found: Found) -> list[str]:
    return [f"{name}: {text}" for name, phase in phases(found).items() for text in phase.get("wrong", ())]


def changed(found: Found) -> list[str]:
    kinds = ("changed", "reverted")
    return [
        f"{name}: {'after reverting, ' * (kind == 'reverted')}{text}"
        for name, phase in phases(found).items()
        for kind in kinds
        for text in phase.get(kind, ())
    ]


def ratio(found: Found, name: str) -> float | None:
    """The bytes kept in a phase over those of the unconverted model, which is checkpointed if the phase is."""
    phase = found["phases"].get(name, {})
    eager = phase.get("eager") or found["phases"].get("eager", {}).get("kept")
    return phase["kept"] / eager if eager and "kept" in phase else None


def _cell(found: Found, name: str) -> str:
    value = ratio(found, name)
    if value is not None:
        return f"{value:.2f}"
    return "raised" if "raised" in found["phases"].get(name, {}) else "-"


def verdict(found: Found) -> str:
    """The verdict on a model in a few words, the worst first."""
    if not runs(found):
        return "not run: " + next((p["raised"] for p in found["phases"].values() if "raised" in p), "no reason known")
    for what, problems in (("raised", raised(found)), ("wrong", wrong(found)), ("changed", changed(found))):
        if problems:
            return f"{what}, {problems[0]}" + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")
    return ""


def row(found: Found) -> list[str]:
    eager, output = found["phases"].get("eager", {}), found["phases"].get("output", {})
    kept = f"{eager['kept'] / 1024:.0f}" if runs(found) else "-"
    counts = [str(output.get("replaced", "-")), str(output.get("left_alone", "-"))]
    ratios = [_cell(found, name) for name in (*LEVELS, *CHECKPOINTED)]
    return [found["name"], eager.get("class", "-"), kept, *ratios, *counts, verdict(found)]


def summary(results: list[Found]) -> list[list[str]]:
    """A row for each library, and one for all."""
    groups = {library: [f for f in results if f["library"] == library] for library in _libraries(results)}
    return [_summary_row(name, group) for name, group in (*groups.items(), ("all", results))]


def _libraries(results: list[Found]) -> list[str]:
    return list(dict.fromkeys(found["library"] for found in results))


def _summary_row(name: str, group: list[Found]) -> list[str]:
    running = [found for found in group if runs(found)]
    counts = [sum(bool(problems_of(found)) for found in running) for problems_of in (raised, wrong, changed)]
    medians = [_median(ratio(found, level) for found in running) for level in LEVELS]
    return [name, str(len(group)), str(len(group) - len(running)), *map(str, counts), *medians]


def _median(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.2f}" if known else "-"


def table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    """A table for the terminal."""
    made = Table(title=title, title_justify="left")
    for column in columns:
        words = column in ("architecture", "class", "library", "found")
        made.add_column(column, justify="left" if words else "right", overflow="fold", no_wrap=column == "architecture")
    for cells in rows:
        made.add_row(*cells)
    return made


def write(folder: pathlib.Path, about: Found, results: list[Found], left_out: dict[str, str]) -> None:
    """Writes survey.json, survey.md and survey.png."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {"machine": about, "left_out": left_out, "results": results}
    (folder / "survey.json").write_text(json.dumps(whole, indent=1))
    lines = ["# What converting does, architecture by architecture", ""]
    lines += [f"- {key}: {value}" for key, value in about.items()]
    lines += [
        "",
        "At a level: bytes kept for backward, as a part of what the model keeps itself; in this table, medians.",
        "",
    ]
    lines += _markdown(SUMMARY, summary(results))
    for library in _libraries(results):
        group = [found for found in results if found["library"] == library]
        lines += ["", f"## {library}", "", *_markdown(COLUMNS, [row(found) for found in group])]
    lines += ["", "## Left out", "", *(f"- {name}: {reason}" for name, reason in left_out.items())]
    (folder / "survey.md").write_text("\n".join(lines) + "\n")
    picture(folder / "survey.png", results, about)


def _markdown(columns: list[str], rows: list[list[str]]) -> list[str]:
    cells = (columns, ["---"] * len(columns), *rows)
    return ["| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in cells]


def picture(path: pathlib.Path, results: list[Found], about: Found) -> None:
    """Draws a panel for each library: for each level, the kept fractions of the models in ascending order."""
    libraries = [name for name in _libraries(results) if any(runs(f) for f in results if f["library"] == name)]
    if not libraries:
        return
    figure, axes = figures.panels(len(libraries), 3, 4.6, 3.6, sharey=True)
    for axis, library in zip(axes, libraries, strict=True):
        group = [found for found in results if found["library"] == library]
        for level in LEVELS:
            values = sorted(v for found in group if (v := ratio(found, level)) is not None)
            if not values:
                continue
            label = f"{level}: median {statistics.median(values):.2f}"
            axis.plot(
                range(1, len(values) + 1),
                values,
                marker=".",
                markersize=4,
                color=palette.COLORS[f"ours, {level}"],
                label=label,
            )
        medians = [v for found in group if (v := ratio(found, "output")) is not None]
        kept = f'{statistics.median(medians):.0%} of eager\'s memory ("output")' if medians else "none converted"
        axis.set_title(f"{library}, {len(group)} models: {kept}", fontsize=10)
        axis.set_xlabel("models, from the least kept on", fontsize=9)
        axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(fontsize=8, loc="lower right")
    # Last, because all panels share an axis, which does not scale from here on.
    axes[0].set_ylim(bottom=0)
    figure.supylabel("kept for backward, as a part of what the model keeps itself", fontsize=9)
    figures.save(figure, path, about)
