"""`python -m benchmarks.convert --survey`."""

import contextlib
import datetime
import pathlib
import signal
import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .. import report as reports
from . import chosen, left_out, report
from .run import TIMEOUT, prepare, survey


def main(patterns: list[str], out: pathlib.Path, jobs: int = 2, timeout: float = TIMEOUT) -> int:
    """Surveys the entries that match a pattern, or all, and writes the results to `out`."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    prepare()
    try:
        entries = chosen(patterns)
    except KeyError as error:
        console.print(f"no architecture fits {error.args[0]!r}")
        return 2
    missing = left_out() if not patterns else {}
    for name, reason in missing.items():
        if "/" not in name:
            console.print(f"left out: {reason}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # The progress bar has no thread of its own, because processes are forked meanwhile.
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        task = progress.add_task("surveying", total=len(entries))

        results: list[dict[str, Any]] = []

        def done(found: dict[str, Any]) -> None:
            results.append(found)
            problem = report.verdict(found)
            if problem:
                progress.console.print(f"{found['name']}: {problem[:160]}", highlight=False, markup=False)
            progress.update(task, advance=1, description=found["name"][:40].ljust(40))
            progress.refresh()
            # Without a terminal no bar is drawn.
            if not console.is_terminal and len(results) % 25 == 0:
                console.print(f"{len(results)} of {len(entries)}")

        # After an interrupt the results so far are still reported.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):
            survey(entries, jobs=jobs, timeout=timeout, done=done)
    order = {entry.name: index for index, entry in enumerate(entries)}
    results.sort(key=lambda found: order[found["name"]])
    console.print(report.table("Architectures", report.COLUMNS, [report.row(found) for found in results]))
    console.print(report.table("Libraries", report.SUMMARY, report.summary(results)))
    by_reason: dict[str, int] = {}
    for name, reason in missing.items():
        if "/" in name:
            by_reason[reason] = by_reason.get(reason, 0) + 1
    if by_reason:
        console.print(f"{sum(by_reason.values())} types of models are left out, as survey.md says one by one")
    command = " ".join(["python -m benchmarks.convert", *sys.argv[1:]])
    about = reports.machine(command, datetime.date.today().isoformat())
    report.write(out, about, results, missing)
    console.print(f"survey.json, survey.md and survey.png are in {out}")
    return 0
