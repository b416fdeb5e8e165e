"""Results as JSON, Markdown and pictures."""

import json
import pathlib
import platform
import statistics
from collections.abc import Sequence
from typing import Any

import torch

import ckpt_kernels
from ckpt_kernels import palette

from . import figures


def machine(command: str, date: str) -> dict[str, Any]:
    """The machine and the settings with which the figures were measured."""
    cuda = torch.cuda.is_available()
    return {
        "date": date,
        "command": command,
        "ckpt_kernels": ckpt_kernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if cuda else _processor(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def row(result: dict[str, Any]) -> list[str]:
    """One provider's figures, formatted for a table."""
    return [
        result["case"],
        result["shape"],
        result["dtype"],
        result["provider"],
        f"{result['forward_ms']:.3f}",
        f"{result['backward_ms']:.3f}",
        f"{result['total_ms']:.3f}",
        f"{result['times_floor']:.2f}" if result["times_floor"] else "-",
        f"{result['times_warm_floor']:.2f}" if result.get("times_warm_floor") else "-",
        f"{result['times_eager']:.2f}",
        f"{result['gb_per_s']:.1f}",
        f"{result['saved_bytes'] / 2**20:.2f}",
        f"{result['peak_bytes'] / 2**20:.2f}",
    ]


COLUMNS = [
    "block",
    "shape",
    "dtype",
    "provider",
    "forward ms",
    "backward ms",
    "total ms",
    "x floor",
    "x warm floor",
    "x eager",
    "GB/s",
    "saved MiB",
    "peak MiB",
]

WIDE_SPREAD = 0.15

MEANS_COLUMNS = ["blocks", "dtype", "cases", "eager", "torch.compile"]


def means(results: list[dict[str, Any]]) -> list[list[str]]:
    """Geometric means of the others' times over ours, over shapes and blocks without the smallest shapes.

    One row is for the blocks of a norm and an activation, one for all blocks.
    """
    found = []
    groups = (("norm and activation", lambda case: "norm" in case and "+" in case), ("all", lambda case: True))
    for name, member in groups:
        chosen = [result for result in results if member(result["case"]) and result["times_floor"]]
        for dtype in dict.fromkeys(result["dtype"] for result in chosen):
            tables = _by_block([result for result in chosen if result["dtype"] == dtype])
            ratios = {
                other: [rows[other]["total_ms"] / _ours(rows)["total_ms"] for rows in tables if other in rows]
                for other in ("eager", "torch.compile")
            }
            figures = [f"{statistics.geometric_mean(times):.2f}x" if times else "-" for times in ratios.values()]
            found.append([name, dtype, str(len(tables)), *figures])
    return found


def spread(times: Sequence[float]) -> float:
    """Half the distance between the quartiles, over the median."""
    if len(times) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / 2 / middle


def noise(spreads: Sequence[float]) -> list[str]:
    """A warning if the machine was too busy for reliable figures: a quarter of them or more vary widely from turn to
    turn."""
    wide = sum(spread > WIDE_SPREAD for spread in spreads)
    if not spreads or wide * 4 < len(spreads):
        return []
    return [
        f"TOO NOISY TO MEAN ANYTHING: of {len(spreads)} figures {wide} spread by more than {WIDE_SPREAD:.0%} from turn "
        "to turn, half of what lies between the quartiles. Run it again on a machine that does nothing else."
    ]


def _by_block(results: list[dict[str, Any]]) -> list[dict[str, dict[str, Any]]]:
    """The results by provider, for each block, shape and dtype."""
    tables: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for result in results:
        key = (result["case"], result["shape"], result["dtype"])
        tables.setdefault(key, {})[result["provider"]] = result
    return list(tables.values())


def _ours(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The result of the automatically chosen backend, which comes first."""
    return next(iter(rows.values()))


def write(folder: pathlib.Path, about: dict[str, Any], results: list[dict[str, Any]], notes: list[str]) -> None:
    """Writes results.json, results.md, summary.md, and for each family a picture of times and one of saved bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps({"machine": about, "notes": notes, "results": results}, indent=1))
    lines = ["# Blocks: forward and backward", "", *(f"- {key}: {value}" for key, value in about.items()), ""]
    lines += [*notes, "", "| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(row(result)) + " |" for result in results]
    (folder / "results.md").write_text("\n".join(lines) + "\n")
    table = [
        "| " + " | ".join(cells) + " |" for cells in (MEANS_COLUMNS, ["---"] * len(MEANS_COLUMNS), *means(results))
    ]
    (folder / "summary.md").write_text(summary(results) + "\n" + "\n".join(table) + "\n")
    draw(folder, about, results)


def draw(folder: pathlib.Path, about: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """Draws for each family a picture of times and one of saved bytes."""
    large = [result for result in results if result["times_floor"]]
    for family in dict.fromkeys(result["family"] for result in large):
        own = [result for result in large if result["family"] == family]
        name = family.replace(" ", "_")
        time = f"{family}: time, as a multiple of the copy floor (lower is better)"
        _bars(own, "times_floor", time, "eager takes {:.1f} times as long", folder / f"time_{name}.png", about)
        saved = f"{family}: kept for backward, in tensors of the input's size"
        _bars(own, "saved_inputs", saved, "eager keeps {:.1f} times as much", folder / f"saved_{name}.png", about)


def write_table(
    folder: pathlib.Path,
    name: str,
    about: dict[str, Any],
    results: list[Any],
    columns: list[str],
    rows: list[list[str]],
) -> None:
    """Writes NAME.json, with all figures and the machine, and NAME.md, with the table."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"machine": about, "results": results}, indent=1))
    lines = [*(f"- {key}: {value}" for key, value in about.items()), ""]
    lines += ["| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *rows)]
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n")


def summary(results: list[dict[str, Any]]) -> str:
    """A row for each block, shape and dtype: our time, and the others' times over ours."""
    head = ["block", "shape", "dtype", "ours ms", "x floor", "eager", "torch.compile", "keeps", "eager keeps"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for by_name in _by_block(results):
        ours = _ours(by_name)
        floor = f"{ours['times_floor']:.2f}" if ours["times_floor"] else "-"
        slower = (
            f"{by_name[name]['total_ms'] / ours['total_ms']:.2f}x" if name in by_name else "-"
            for name in ("eager", "torch.compile")
        )
        kept = (f"{by_name[name]['saved_inputs']:.2f}" for name in (ours["provider"], "eager"))
        key = (ours["case"], ours["shape"], ours["dtype"])
        lines.append("| " + " | ".join((*key, f"{ours['total_ms']:.2f}", floor, *slower, *kept)) + " |")
    return "\n".join(lines) + "\n"


def _bars(
    results: list[dict[str, Any]],
    figure: str,
    label: str,
    finding: str,
    path: pathlib.Path,
    about: dict[str, Any],
) -> None:
    """Draws a panel for each shape and dtype, with a group of bars for each block. `finding`: eager against ours."""
    panels = list(dict.fromkeys((result["shape"], result["dtype"]) for result in results))
    names = list(dict.fromkeys(result["provider"] for result in results))
    picture, axes = figures.panels(len(panels), 2, 6.5, 3.4, sharey=True)
    for axis, (shape, dtype) in zip(axes, panels, strict=True):
        here = [result for result in results if (result["shape"], result["dtype"]) == (shape, dtype)]
        cases = list(dict.fromkeys(result["case"] for result in here))
        for index, name in enumerate(names):
            found = {
                result["case"]: result[figure]
                for result in results
                if (result["shape"], result["dtype"], result["provider"]) == (shape, dtype, name)
            }
            places = [place + (index - len(names) / 2 + 0.5) * 0.8 / len(names) for place in range(len(cases))]
            heights = [found.get(case, 0) for case in cases]
            bars = axis.bar(places, heights, 0.8 / len(names), label=name, color=palette.color_of(name))
            axis.bar_label(bars, [f"{h:.1f}" if h else "" for h in heights], fontsize=6, padding=1)
        ratios = [rows["eager"][figure] / _ours(rows)[figure] for rows in _by_block(here) if "eager" in rows]
        found_here = finding.format(statistics.geometric_mean(ratios)) if ratios else ""
        axis.set_title(f"{shape}, {dtype}: {found_here}" if ratios else f"{shape}, {dtype}", fontsize=10)
        axis.margins(y=0.12)
        axis.set_xticks(range(len(cases)), cases, fontsize=8, rotation=12)
        axis.grid(axis="y", alpha=0.3)
        axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
    figures.legend(picture, axes, len(names), label)
    figures.save(picture, path, about)
