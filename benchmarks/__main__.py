"""`python -m benchmarks`: the blocks against eager torch, torch.compile, checkpointing and peers."""

import argparse
import itertools
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ckpt_kernels.cli_arguments import amount, positive

from . import baseline, report, start
from .cases import CASES, Case, Setting
from .measure import measure
from .providers import providers

NOTE = (
    "Medians of passes taken in turn. The copy floor is the time that the copies of the same run need for the "
    "bytes that must cross memory, forward and backward; copies go into memory that is there already. At 8x64 "
    "only the overhead of a call is seen, and there is no floor to compare with. GB/s are of those bytes, too."
)

DTYPES = ("float32", "bfloat16", "float16")


def arguments() -> argparse.Namespace:
    parser = start.parser("benchmarks", __doc__)
    parser.add_argument("--quick", action="store_true", help="under a minute: a shape a block, ours and eager only")
    parser.add_argument("--full", action="store_true", help="more shapes, and torch.compile for all of them")
    parser.add_argument("--rounds", type=positive, help="counted turns of each provider (default: 12; quick: 7)")
    parser.add_argument("--seconds", type=amount, default=math.inf, help="measure nothing new after this long")
    parser.add_argument("--case", default="", help="only blocks whose name contains this")
    parser.add_argument("--shape", type=_shape, metavar="AxB", help="this shape alone, for the blocks that take it")
    parser.add_argument("--dtype", choices=DTYPES, help="this dtype alone")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--max-autotune", action="store_true", help="torch.compile in that mode too")
    parser.add_argument("--baseline", type=pathlib.Path, metavar="FILE", help="a results.json to compare with")
    options = parser.parse_args()
    options.rounds = options.rounds or (7 if options.quick else 12)
    options.no_compile |= options.quick
    named = [case for case in CASES if options.case in case.name]
    if not named:
        parser.error(f"--case is {options.case!r}; the blocks are {', '.join(case.name for case in CASES)}")
    if options.shape and not any(map(_takes(options.shape), named)):
        parser.error(f"--shape is {'x'.join(map(str, options.shape))}; these blocks take 2 dimensions or more")
    try:
        options.before = baseline.read(options.baseline) if options.baseline else []
    except (OSError, ValueError) as error:
        parser.error(f"--baseline: {error}")
    return options


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.split("x"))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; expected numbers with x between them, as in 4096x1024")
    return shape


def _takes(shape: tuple[int, ...]) -> Callable[[Case], bool]:
    """A test whether the function of a case accepts this shape."""
    return lambda case: len(shape) >= (2 if case.block.channels else 1)


def plan(device: str, options: argparse.Namespace) -> Iterator[tuple[Case, Setting, torch.dtype]]:
    """The cases, settings and dtypes to measure, in the order of the report."""
    dtypes = (torch.bfloat16,) if device == "cuda" else (torch.float32, torch.bfloat16)
    if options.dtype:
        dtypes = (getattr(torch, options.dtype),)
    for family in dict.fromkeys(case.family for case in CASES):
        cases = [case for case in CASES if case.family == family and options.case in case.name]
        settings = {case.name: _settings(case, device, options) for case in cases}
        for dtype, setting in itertools.product(dtypes, dict.fromkeys(itertools.chain(*settings.values()))):
            # The overhead of a call does not depend on the dtype.
            if not setting.small or dtype == dtypes[0]:
                yield from ((case, setting, dtype) for case in cases if setting in settings[case.name])


def _settings(case: Case, device: str, options: argparse.Namespace) -> list[Setting]:
    if options.shape:
        if not _takes(options.shape)(case):
            return []
        images = len(options.shape) == 4
        layouts = dict.fromkeys(setting.channels_last and images for setting in case.settings(device))
        return [Setting(options.shape, layout) for layout in layouts]
    found = [setting for setting in case.settings(device) if options.full or not setting.full]
    return found[:1] if options.quick else found


def measured(
    case: Case, setting: Setting, dtype: torch.dtype, device: str, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The figures of every provider for one block, shape and dtype."""
    torch._dynamo.reset()
    # Compiling takes longer than measuring.
    compiled = not options.no_compile and (options.full or not (setting.channels_last or setting.small))
    everyone = providers(case, device, dtype, compiled, options.max_autotune)
    if options.quick:
        everyone = [provider for provider in everyone if provider.name != "checkpoint"]
    timings, copy_ms, warm_ms = measure(
        case, setting, dtype, device, everyone, options.rounds * (20 if setting.small else 1)
    )
    unit = torch.Size(setting.shape).numel() * dtype.itemsize
    for provider, timing in timings.items():
        yield {
            "family": case.family,
            "case": case.name,
            "shape": setting.label,
            "dtype": str(dtype).removeprefix("torch."),
            "provider": provider,
            "forward_ms": timing.forward,
            "backward_ms": timing.backward,
            "total_ms": timing.total,
            "spread": timing.spread,
            "gb_per_s": unit * sum(case.traffic) / timing.total / 1e6,
            "copy_ms": copy_ms,
            "copy_gb_per_s": 2 * unit / copy_ms / 1e6,
            "warm_copy_gb_per_s": 2 * unit / warm_ms / 1e6,
            # A copy moves two tensors of the input's size.
            "times_floor": None if setting.small else timing.total / (copy_ms * sum(case.traffic) / 2),
            "times_warm_floor": None if setting.small else timing.total / (warm_ms * sum(case.traffic) / 2),
            "times_eager": timing.total / timings["eager"].total,
            "saved_bytes": timing.saved_bytes,
            "saved_inputs": timing.saved_bytes / unit,
            "peak_bytes": timing.peak_bytes,
            "allocations": timing.allocations,
        }


def printed(console: Console, results: list[dict[str, Any]]) -> None:
    """Prints the table, the bandwidths of copies and the geometric means."""
    table = Table(*report.COLUMNS, title="Blocks: forward and backward", title_justify="left")
    for previous, result in zip([None, *results], results, strict=False):
        if previous and any(previous[key] != result[key] for key in ("case", "shape", "dtype")):
            table.add_section()
        table.add_row(*report.row(result), style="bold" if result["provider"].startswith("ours") else "")
    console.print(table)
    for kind, key in (("cold", "copy_gb_per_s"), ("warm", "warm_copy_gb_per_s")):
        copies: dict[str, list[float]] = {}
        for result in results:
            copies.setdefault(f"{result['shape']} {result['dtype']}", []).append(result[key])
        for name, found in copies.items():
            console.print(f"{kind} copy {name}: {min(found):.1f} to {max(found):.1f} GB/s")
    means = Table(*report.MEANS_COLUMNS, title="Geometric means, how many times as long as ours", title_justify="left")
    for mean in report.means(results):
        means.add_row(*mean)
    console.print(means)


def compared(console: Console, options: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """Prints the times that changed against the baseline."""
    both = baseline.moves(options.before, results)
    moved = [move for move in both if move.beyond_noise]
    console.print(f"{len(both)} figures are in {options.baseline} too; {len(moved)} have moved beyond the noise.")
    if moved:
        table = Table(*baseline.COLUMNS)
        for move in moved:
            table.add_row(*move.cells(), style="red" if move.ratio > 1 else "green")
        console.print(table)


def main() -> int:
    options = arguments()
    device, about, console = start.start("benchmarks", options)
    results: list[dict[str, Any]] = []
    notes = [NOTE]
    todo = list(plan(device, options))
    with start.progress(console) as progress:
        task = progress.add_task("measuring", total=len(todo))
        begun = time.monotonic()
        for case, setting, dtype in todo:
            if time.monotonic() - begun > options.seconds:
                notes.append(f"Stopped after {options.seconds:.0f} seconds, before all blocks were measured.")
                break
            name = f"{case.name} {setting.label} {str(dtype).removeprefix('torch.')}"
            progress.update(task, description=f"{name:<60}")
            results += measured(case, setting, dtype, device, options)
            progress.advance(task)
    printed(console, results)
    # Calls on the smallest shapes are left out.
    notes += report.noise([result["spread"] for result in results if result["times_floor"]])
    for note in notes[1:]:
        console.print(note)
    report.write(options.out, about, results, notes)
    console.print(f"results.json, results.md, summary.md and pictures are in {options.out}")
    if options.baseline:
        compared(console, options, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
