"""`python -m benchmarks.sweep`: blocks against the copy floor, by the length and the number of rows."""

import pathlib
import sys
from typing import Any

import torch
from rich.table import Table

from ckpt_kernels import palette

from . import figures, report, start
from .cases import CASES, Case, Setting
from .measure import measure
from .providers import providers

# The lengths of rows, at a constant number of elements; and the numbers of rows, at one length.
LENGTHS = tuple(2**power for power in range(6, 17, 2))
COUNTS = tuple(4**power for power in range(8))
COUNTED_LENGTH = 1024


def settings(device: str) -> list[tuple[str, Setting]]:
    """Pairs of "by length" or "by count", and the setting."""
    elements = 2**26 if device == "cuda" else 2**22
    by_length = [("by length", Setting((elements // length, length))) for length in LENGTHS]
    return by_length + [("by count", Setting((count, COUNTED_LENGTH))) for count in COUNTS]


def point(sweep: str, case: Case, setting: Setting, dtype: torch.dtype, device: str, compiled: bool) -> dict[str, Any]:
    """Every provider's time, and the share of the copy bandwidth that the provider reaches."""
    torch._dynamo.reset()
    everyone = [p for p in providers(case, device, dtype, compiled) if p.name != "checkpoint"]
    # Small settings are quick and noisy.
    rounds = min(max(2**24 // torch.Size(setting.shape).numel(), 5), 200)
    timings, copy_ms, _ = measure(case, setting, dtype, device, everyone, rounds)
    floor_ms = copy_ms * sum(case.traffic) / 2
    return {
        "sweep": sweep,
        "case": case.name,
        "rows": setting.shape[0],
        "columns": setting.shape[1],
        "dtype": str(dtype).removeprefix("torch."),
        "copy_ms": copy_ms,
        "spread": {name: timing.spread for name, timing in timings.items()},
        "total_ms": {name: timing.total for name, timing in timings.items()},
        "fraction_of_copy": {name: floor_ms / timing.total for name, timing in timings.items()},
    }


def draw(points: list[dict[str, Any]], path: pathlib.Path, about: dict[str, Any]) -> None:
    """Draws a row of panels for each dtype: the share of the copy's bandwidth by length, and the time by count."""
    dtypes = list(dict.fromkeys(p["dtype"] for p in points))
    lines = list(dict.fromkeys((p["case"], name) for p in points for name in p["total_ms"]))
    styles = dict(zip(dict.fromkeys(case for case, _ in lines), ("-", "--", ":", "-."), strict=False))
    figure, axes = figures.panels(2 * len(dtypes), 2, 6.5, 4.4)
    for left, right, dtype in zip(axes[::2], axes[1::2], dtypes, strict=True):
        there = [p for p in points if p["dtype"] == dtype]
        by_length, by_count = ([p for p in there if p["sweep"] == sweep] for sweep in ("by length", "by count"))
        for case, name in lines:
            style = {
                "color": palette.color_of(name),
                "linestyle": styles.get(case, "-."),
                "linewidth": 2.2 if name.startswith("ours") else 1.2,
                "marker": "o",
                "markersize": 4,
                "label": f"{case}, {name}",
            }
            own = [p for p in by_length if p["case"] == case and name in p["total_ms"]]
            left.plot([p["columns"] for p in own], [p["fraction_of_copy"][name] for p in own], **style)
            own = [p for p in by_count if p["case"] == case and name in p["total_ms"]]
            right.plot([p["rows"] for p in own], [p["total_ms"][name] * 1e3 for p in own], **style)
        left.set_xscale("log", base=2)
        left.axhline(1, color="black", linewidth=0.8, linestyle=":")
        left.set(xlabel="N, length of a row; as many rows as make the same size", ylabel="part of the copy's bandwidth")
        left.set_ylim(0, None)
        reached = [v for p in by_length for name, v in p["fraction_of_copy"].items() if name.startswith("ours")]
        left.set_title(f"{dtype}: {min(reached):.0%} to {max(reached):.0%} of a copy's bandwidth", fontsize=11)
        right.set_xscale("log", base=4)
        right.set_yscale("log")
        right.set(xlabel=f"M, number of rows of {COUNTED_LENGTH}", ylabel="forward and backward, us")
        right.set_title(f"{dtype}: {_times_as_long(by_count)}", fontsize=11)
        for axis in (left, right):
            axis.grid(alpha=0.3)
    figures.legend(figure, axes[:1], 3)
    figures.save(figure, path, about)


def _times_as_long(points: list[dict[str, Any]]) -> str:
    """A sentence with eager's time over ours, for the fewest and the most rows."""

    def ratio(point: dict[str, Any]) -> float:
        ours = next(time for name, time in point["total_ms"].items() if name.startswith("ours"))
        return point["total_ms"]["eager"] / ours

    fewest, most = (choose(points, key=lambda point: point["rows"]) for choose in (min, max))
    return (
        f"of {fewest['rows']} to {most['rows']} rows eager takes {ratio(fewest):.1f} to {ratio(most):.1f} times as long"
    )


def main() -> int:
    parser = start.parser("benchmarks.sweep", __doc__)
    names = [case.name for case in CASES if case.family == "row norms"]
    parser.add_argument("--case", nargs="+", choices=names, default=["rms_norm+silu"], metavar="NAME",
                        help=f"of {', '.join(names)}")  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="torch.compile too, which takes seconds a shape")
    options = parser.parse_args()
    device, about, console = start.start("benchmarks.sweep", options)
    dtypes = (torch.bfloat16,) if device == "cuda" else (torch.float32, torch.bfloat16)
    cases = [case for case in CASES if case.name in options.case]
    todo = [(dtype, case, *place) for dtype in dtypes for case in cases for place in settings(device)]
    points = []
    with start.progress(console) as progress:
        task = progress.add_task("measuring", total=len(todo))
        for dtype, case, sweep, setting in todo:
            progress.update(task, description=f"{case.name} {setting.label} {str(dtype).removeprefix('torch.'):<30}")
            points.append(point(sweep, case, setting, dtype, device, options.compile))
            progress.advance(task)
    everyone = list(dict.fromkeys(name for p in points for name in p["total_ms"]))
    title = "Total time in ms, and the part of the copy's bandwidth that is reached"
    table = Table("block", "dtype", "M x N", *everyone, title=title, title_justify="left")
    rows = [
        [p["case"], p["dtype"], f"{p['rows']} x {p['columns']}"]
        + [f"{p['total_ms'][n]:.3f} / {p['fraction_of_copy'][n]:.2f}" if n in p["total_ms"] else "-" for n in everyone]
        for p in points
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)
    # The shortest calls are left out.
    large = [p for p in points if p["rows"] * p["columns"] > 2**20]
    for line in report.noise([spread for p in large for spread in p["spread"].values()]):
        console.print(line, style="bold red")
    report.write_table(options.out, "sweep", about, points, ["block", "dtype", "M x N", *everyone], rows)
    draw(points, options.out / "sweep.png", about)
    console.print(f"sweep.json, sweep.md and sweep.png are in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
