"""The memory report as a table and as a picture, with equal layers in one row."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..palette import COLORS

if TYPE_CHECKING:
    import pathlib

    from .by_module import ModuleMemory, Report


class Row(NamedTuple):
    """Modules with equal names except for numbers, of one class, that keep the same. The bytes are the total of all."""

    name: str
    kind: str
    modules: int
    saved: int
    other: int


def rows_of(modules: Sequence["ModuleMemory"], depth: int | None = None) -> list[Row]:
    """A row for each set of equal modules, in the order of their first modules.

    With a `depth`, modules whose names have more parts count for the module that contains them: 0 is the whole model.
    """
    merged: dict[str, tuple[str, int, int]] = {}
    for module in modules:
        name = module.name if depth is None else ".".join(module.name.split(".")[:depth])
        kind, saved, other = merged.get(name, ("", 0, 0))
        kind = module.kind if name == module.name else kind
        merged[name] = kind, saved + module.saved, other + module.discarding
    groups: dict[tuple[str, str, int, int], list[str]] = {}
    for name, kept in merged.items():
        groups.setdefault((re.sub(r"\b\d+\b", "*", name), *kept), []).append(name)
    return [
        Row(spanned(names) or "(whole)", kind, len(names), saved * len(names), other * len(names))
        for (_, kind, saved, other), names in groups.items()
    ]


def spanned(names: Sequence[str]) -> str:
    """One name for several that differ in numbers: `layers.0-11.norm`."""
    spans = []
    for parts in zip(*(name.split(".") for name in names), strict=True):
        numbers = sorted({int(part) for part in parts if part.isdecimal()})
        if len(set(parts)) == 1:
            spans.append(parts[0])
        elif numbers == list(range(numbers[0], numbers[-1] + 1)):
            spans.append(f"{numbers[0]}-{numbers[-1]}")
        else:
            spans.append(",".join(map(str, numbers)) if len(numbers) < 5 else "*")
    return ".".join(spans)


def size(count: int) -> str:
    """A number of bytes in MiB, or in KiB if small."""
    if count >= 2**20:
        return f"{count / 2**20:.2f} MiB"
    return f"{count / 2**10:.2f} KiB" if count else "0"


def text(report: "Report", depth: int | None = None) -> str:
    """The table with totals, peaks, and notes on the columns."""
    pairs = [("kept for backward", report.saved, report.discarding)]
    pairs.append(("peak, forward and backward", report.peak, report.discarding_peak))
    rows = rows_of(report.modules, depth)
    cells: list[tuple[str, ...]] = [("module", "", "", *report.titles)]
    cells += [(r.name, r.kind, f"x {r.modules}" if r.modules > 1 else "", size(r.saved), size(r.other)) for r in rows]
    cells += [(name, "", "", size(saved), size(other)) for name, saved, other in pairs]
    if report.is_alike:
        cells = [row[:-1] for row in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            c.rjust(w) if i > 2 else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    rule = "-" * max(map(len, lines))
    shared = sum(tensor.counted == 0 for tensor in report.tensors)
    notes = [f"{len(report.tensors)} tensors are kept, of which {shared} share the memory of another."]
    if any(row.modules > 1 for row in rows):
        notes.append("x 2: as many equal modules in one row, which counts them all.")
    if report.is_alike:
        notes.append(f"{report.titles[1]}: the same.")
    return "\n".join([lines[0], rule, *lines[1:-2], rule, *lines[-2:], "", *notes])


def draw(report: "Report", path: "str | pathlib.Path", depth: int | None = None, most: int = 15) -> None:
    """Draws a PNG with bars for the rows that keep most, the largest first, and one for all others. Needs
    matplotlib."""
    from matplotlib.figure import Figure

    rows = sorted(rows_of(report.modules, depth), key=lambda row: max(row.saved, row.other), reverse=True)
    if len(rows) > most:
        rest = rows[most - 1 :]
        rows[most - 1 :] = [Row(f"{len(rest)} more", "", 1, sum(r.saved for r in rest), sum(r.other for r in rest))]
    series = [(report.titles[0], [row.saved for row in rows], report.saved, COLORS["eager"])]
    if not report.is_alike:
        series.append((report.titles[1], [row.other for row in rows], report.discarding, COLORS["ours"]))
    figure = Figure(figsize=(10, 1.8 + 0.3 * len(series) * len(rows)), layout="constrained")
    axis = figure.subplots()
    height = 0.8 / len(series)
    # The axis has the unit of the longest bar's label.
    unit, name = (2**20, "MiB") if max(max(values, default=0) for _, values, *_ in series) >= 2**20 else (2**10, "KiB")
    for index, (title, values, total, color) in enumerate(series):
        positions = [place + (index - (len(series) - 1) / 2) * height for place in range(len(rows))]
        label = f"{title}: {size(total)} in all"
        bars = axis.barh(positions, [value / unit for value in values], height * 0.92, label=label, color=color)
        axis.bar_label(bars, [f"{size(value)}, {value / max(total, 1):.0%}" for value in values], fontsize=8, padding=3)
    labels = [f"{row.name}  {row.kind}" + (f"  x {row.modules}" if row.modules > 1 else "") for row in rows]
    axis.set_yticks(range(len(rows)), labels, fontsize=9)
    axis.invert_yaxis()
    axis.margins(x=0.25)
    axis.set_xlabel(f"kept for backward, {name}")
    axis.set_title("What is kept for backward, by module")
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=2, fontsize=10)
    figure.savefig(path, dpi=110)
