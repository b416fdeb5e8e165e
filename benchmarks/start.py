"""The start of every benchmark: shared options, the allocator's thresholds, and a description of the machine."""

import argparse
import datetime
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ckpt_kernels.cli_arguments import folder

from . import report
from .malloc import raise_malloc_thresholds


def named(parser: argparse.ArgumentParser, text: str, names: Sequence[str]) -> list[str]:
    """The names that contain the text of --case. Ends the command if no name does."""
    found = [name for name in names if text.lower() in name.lower()]
    if not found:
        parser.error(f"--case is {text!r}; expected a part of one of {', '.join(names)}")
    return found


class Start(NamedTuple):
    """The device, the description that is written beside the figures, and the console."""

    device: str
    about: dict[str, Any]
    console: Console


def parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """An argument parser with the shared options."""
    found = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    found.add_argument("--out", type=folder, default=pathlib.Path("out/benchmarks"), help="where results go")
    found.add_argument(
        "--raise-malloc-thresholds",
        action="store_true",
        help="have the C allocator keep what is freed, instead of its defaults, which users have",
    )
    return found


def start(module: str, options: argparse.Namespace) -> Start:
    """Starts the benchmark; on the CPU, if requested, in a process whose allocator keeps freed memory."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    raised = device == "cpu" and options.raise_malloc_thresholds
    if raised:
        raise_malloc_thresholds(module)
    command = " ".join([f"python -m {module}", *sys.argv[1:]])
    about = report.machine(command, datetime.date.today().isoformat())
    about["malloc thresholds"] = "raised" if raised else "defaults"
    console = Console(width=None if sys.stdout.isatty() else 190)
    console.print(f"{about['device']}, {about['threads']} threads, torch {about['torch']}, malloc thresholds "
                  f"{about['malloc thresholds']}")  # fmt: skip
    return Start(device, about, console)


def progress(console: Console) -> Progress:
    """A progress bar with the current measurement, the count and the elapsed time."""
    return Progress(TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn(), console=console)
