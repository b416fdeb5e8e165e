"""`python -m benchmarks.survey.timing`: times steps of the survey's wide models, unconverted and converted, in turn.

Each model is timed in a process of its own, on one thread: a step (forward and backward) of 256 tokens, for which calls
in Python count as much as kernels, and one of 1,024. Images keep their size. The ratio is of lower quartiles, because
on a machine that others use as well single steps take twice as long.
"""

import argparse
import contextlib
import datetime
import json
import multiprocessing
import pathlib
import statistics
import sys
import time
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import ckpt_kernels
from ckpt_kernels.cli_arguments import folder

from .. import report as reports
from . import chosen
from .entry import WIDE, Entry, Shape
from .step import Subject

SHAPES = {"256 tokens": Shape(4, 64), "1,024 tokens": Shape(8, 128)}
COLUMNS = ["architecture", *(f"{which}, {shape}" for shape in SHAPES for which in ("eager, ms", "ratio"))]
_TURNS = 6

Found = dict[str, Any]
_fork = multiprocessing.get_context("fork")


def times(entry: Entry, shape: Shape, turns: int = _TURNS) -> Found:
    """The seconds of a step of the wide model, unconverted and at "output", taken in turn, and their ratio."""
    subject = Subject(entry, WIDE, (shape, shape))
    model = subject.model()
    seconds: dict[str, list[float]] = {"eager": [], "output": []}
    for _ in range(turns):
        for name in seconds:
            ckpt_kernels.revert(model) if name == "eager" else ckpt_kernels.convert(model, recompute="output")
            # The first step after a change differs from the others.
            subject.bare_step(model)
            for _ in range(2):
                start = time.perf_counter()
                subject.bare_step(model)
                seconds[name].append(time.perf_counter() - start)
    quartiles = {name: statistics.quantiles(values)[0] for name, values in seconds.items()}
    return quartiles | {"ratio": quartiles["output"] / quartiles["eager"]}


def _child(send: Any, entry: Entry) -> None:
    from .measure import said

    # A fork does not have the threads of the parent.
    torch.set_num_threads(1)
    for name, shape in SHAPES.items():
        try:
            send.send((name, times(entry, shape)))
        except Exception as error:
            send.send((name, {"raised": said(error)}))


def timed(entry: Entry, timeout: float) -> Found:
    """The figures by shape, measured in a process that may take that many seconds."""
    receive, send = _fork.Pipe(duplex=False)
    process = _fork.Process(target=_child, args=(send, entry), daemon=True)
    process.start()
    send.close()
    found: Found = {"name": entry.name}
    deadline = time.perf_counter() + timeout
    with contextlib.suppress(EOFError):  # the process has sent everything
        while receive.poll(max(deadline - time.perf_counter(), 0.0)):
            name, value = receive.recv()
            found[name] = value
    process.kill()
    process.join()
    return found


def cells(found: Found) -> list[str]:
    row = [found["name"]]
    for shape in SHAPES:
        of_shape = found.get(shape, {})
        known = "ratio" in of_shape
        row += [f"{1e3 * of_shape['eager']:.1f}", f"{of_shape['ratio']:.2f}"] if known else ["-", "-"]
    return row


def summary(results: list[Found]) -> list[str]:
    """For each shape, the number of timed models, the median ratio, and the number of ratios above 1.10."""
    lines = []
    for shape in SHAPES:
        ratios = [found[shape]["ratio"] for found in results if "ratio" in found.get(shape, {})]
        if ratios:
            above = sum(ratio > 1.1 for ratio in ratios)
            median = statistics.median(ratios)
            lines.append(f"{shape}: {len(ratios)} models, median {median:.2f}, {above} above 1.10")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.survey.timing", description=__doc__)
    parser.add_argument("patterns", nargs="*", metavar="NAME", help="with * and ?; default all that can be made wide")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for one model")
    parser.add_argument("--out", type=folder, default=pathlib.Path("out"))
    options = parser.parse_args()
    from .run import prepare

    prepare()
    console = Console(width=None if sys.stdout.isatty() else 120)
    entries = [entry for entry in chosen(options.patterns) if entry.has_wide]
    results = [timed(entry, options.timeout) for entry in track(entries, "timing", console=console)]
    table = Table(*COLUMNS, title="Steps at width 256 and up: eager, and converted at output over eager")
    for found in results:
        table.add_row(*cells(found))
    console.print(table)
    lines_of_summary = summary(results)
    console.print("\n".join(lines_of_summary))
    command = " ".join(["python -m benchmarks.survey.timing", *sys.argv[1:]])
    about = reports.machine(command, datetime.date.today().isoformat())
    options.out.mkdir(parents=True, exist_ok=True)
    whole = {"machine": about, "results": results}
    (options.out / "survey_times.json").write_text(json.dumps(whole, indent=1))
    lines = ["# Steps of the survey's wide models", "", *(f"- {key}: {value}" for key, value in about.items()), ""]
    lines += [*(f"- {line}" for line in lines_of_summary), "", "| " + " | ".join(COLUMNS) + " |"]
    lines += ["| --- |" + " ---: |" * (len(COLUMNS) - 1)]
    lines += ["| " + " | ".join(cells(found)) + " |" for found in results]
    (options.out / "survey_times.md").write_text("\n".join(lines) + "\n")
    console.print(f"survey_times.json and survey_times.md are in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
