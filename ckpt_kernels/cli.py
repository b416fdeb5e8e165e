"""The command `ckpt-kernels`."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from . import doctor, memory
from .version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(prog="ckpt-kernels", description="Tools for the ckpt_kernels package.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "doctor", help="which backend serves CPU and CUDA calls, and why the others do not; exit status 1 if not well"
    )
    kept = commands.add_parser("memory", help="what a model keeps for backward, by module")
    kept.add_argument(
        "target",
        metavar="MODULE:CALLABLE",
        help="a function without arguments that returns (model, inputs): a module, and a tuple of what it is called "
        "with, or a dict of it by name",
    )
    kept.add_argument("--png", metavar="FILE", help="draw the table there")
    kept.add_argument("--json", metavar="FILE", help="write the report there as data")
    options = parser.parse_args(arguments)
    if options.command == "memory":
        return _memory(options)
    text, well = doctor.report()
    print(text)
    return 0 if well else 1


def _memory(options: argparse.Namespace) -> int:
    try:
        model, inputs = _load(options.target)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        print(f"{options.target} does not give (model, inputs): {error}", file=sys.stderr)
        return 2
    report = memory.report(model, **inputs) if isinstance(inputs, dict) else memory.report(model, *inputs)
    print(report)
    if options.json:
        report.to_json(options.json)
    if options.png:
        report.draw(options.png)
    return 0


def _load(target: str) -> Any:
    """What MODULE:CALLABLE names; modules are looked for in the current folder too."""
    module, colon, name = target.partition(":")
    if not colon:
        raise ValueError("expected MODULE:CALLABLE")
    sys.path.insert(0, os.getcwd())
    return getattr(importlib.import_module(module), name)


if __name__ == "__main__":
    sys.exit(main())
