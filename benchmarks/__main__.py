"""`python -m benchmarks`: the blocks against eager torch, torch.compile, checkpointing and peers."""

import argparse
import datetime
import itertools
import math
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import report
from .cases import CASES, Case, Setting
from .malloc import raise_malloc_thresholds
from .measure import measure
from .providers import providers


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/benchmarks"), help="where results go")
    parser.add_argument("--rounds", type=int, default=15, help="counted turns of each provider")
    parser.add_argument("--seconds", type=float, default=math.inf, help="measure nothing new after this long")
    parser.add_argument("--case", default="", help="only blocks whose name contains this")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--malloc-defaults", action="store_true", help="leave the C allocator's thresholds alone")
    return parser.parse_args()


def plan(device: str, name: str) -> Iterator[tuple[Case, Setting, torch.dtype]]:
    """What is measured, in the order of the report."""
    dtypes = (torch.bfloat16,) if device == "cuda" else (torch.float32, torch.bfloat16)
    chosen = [case for case in CASES if name in case.name]
    for family in dict.fromkeys(case.family for case in chosen):
        cases = [case for case in chosen if case.family == family]
        settings = dict.fromkeys(setting for case in cases for setting in case.settings(device))
        for dtype, setting in itertools.product(dtypes, settings):
            # What a call costs does not depend on the dtype.
            if not setting.small or dtype == dtypes[0]:
                yield from ((case, setting, dtype) for case in cases if setting in case.settings(device))


def main() -> int:
    options = arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    raised = raise_malloc_thresholds("benchmarks", device, options.malloc_defaults)
    command = " ".join(["python -m benchmarks", *sys.argv[1:]])
    about = report.machine(command, datetime.date.today().isoformat())
    about["malloc thresholds"] = "raised" if raised else "defaults"
    console = Console(width=None if sys.stdout.isatty() else 132)
    console.print(f"{about['device']}, {about['threads']} threads, torch {about['torch']}, malloc thresholds "
                  f"{about['malloc thresholds']}")  # fmt: skip
    results: list[dict[str, Any]] = []
    bandwidths: dict[str, list[float]] = {}
    progress = Progress(TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn(), console=console)
    with progress:
        todo = list(plan(device, options.case))
        task = progress.add_task("measuring", total=len(todo))
        start = time.monotonic()
        for case, setting, dtype in todo:
            if time.monotonic() - start > options.seconds:
                break
            name = f"{case.name} {setting.label} {str(dtype).removeprefix('torch.')}"
            progress.update(task, description=f"{name:<60}")
            torch._dynamo.reset()
            rounds = options.rounds * (20 if setting.small else 1)
            everyone = providers(case, device, dtype, not options.no_compile)
            timings, copy_ms = measure(case, setting, dtype, device, everyone, rounds)
            unit = torch.Size(setting.shape).numel() * dtype.itemsize
            for provider, timing in timings.items():
                # A copy moves two tensors of the input's size.
                floor = copy_ms * sum(case.traffic) / 2
                results.append(
                    {
                        "family": case.family,
                        "case": case.name,
                        "shape": setting.label,
                        "dtype": str(dtype).removeprefix("torch."),
                        "provider": provider,
                        "forward_ms": timing.forward,
                        "backward_ms": timing.backward,
                        "total_ms": timing.total,
                        "copy_ms": copy_ms,
                        "copy_gb_per_s": 2 * unit / copy_ms / 1e6,
                        "times_floor": None if setting.small else timing.total / floor,
                        "times_eager": timing.total / timings["eager"].total,
                        "saved_bytes": timing.saved_bytes,
                        "saved_inputs": timing.saved_bytes / unit,
                    }
                )
            bandwidths.setdefault(f"{setting.label} {dtype}", []).append(2 * unit / copy_ms / 1e6)
            progress.advance(task)
    notes = [
        "Medians of passes taken in turn. The copy floor is the time that the copies of the same run need for the "
        "bytes that must cross memory, forward and backward; copies go into memory that is there already. At 8x64 "
        "only the overhead of a call is seen, and there is no floor to compare with."
    ]
    if not progress.finished:
        notes.append(f"Stopped after {options.seconds:.0f} seconds, before all blocks were measured.")
        console.print(notes[-1])
    table = Table(*report.COLUMNS, title="Blocks: forward and backward", title_justify="left")
    for previous, result in zip([None, *results], results, strict=False):
        if previous and (previous["case"], previous["shape"], previous["dtype"]) != (
            result["case"],
            result["shape"],
            result["dtype"],
        ):
            table.add_section()
        table.add_row(*report.row(result), style="bold" if result["provider"].startswith("ours") else "")
    console.print(table)
    for name, found in bandwidths.items():
        console.print(f"copy {name}: {min(found):.1f} to {max(found):.1f} GB/s")
    report.write(options.out, about, results, notes)
    console.print(f"results.json, results.md, summary.md and pictures are in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
