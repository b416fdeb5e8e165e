"""The command `ckpt-kernels`."""

import argparse
import functools
import importlib.util
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from . import check, doctor, inspect, memory
from .cli_arguments import file, natural, picture, positive
from .convert import convert, is_converted, revert
from .inspect import ARCHITECTURES, COLUMNS, roofline
from .levels import OF_MODELS
from .model_copies import copy_of
from .plan import DoesNotFit, plan
from .plan.budget import Budget, bytes_of
from .target import Inputs, TargetError, arguments_of, load_target
from .version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns the exit status."""
    try:
        return _main(arguments)
    except _NotWritten as error:
        # A reader that stops early, such as `head`, needs no message.
        if not isinstance(error.__cause__, BrokenPipeError):
            print(error, file=sys.stderr)
        return 2


def _main(arguments: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="ckpt-kernels", description="Tools for the ckpt_kernels package.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "doctor", help="which backend serves CPU and CUDA calls, and why the others do not; exit status 1 if not well"
    )
    kept = commands.add_parser("memory", help="what a model keeps for backward, by module")
    _add_target(kept)
    kept.add_argument(
        "--convert",
        choices=OF_MODELS,
        metavar="LEVEL",
        help=f"compare with the model converted at a level: {', '.join(OF_MODELS)}",
    )
    kept.add_argument(
        "--depth",
        type=natural,
        metavar="N",
        help="merge modules by the first N parts of their names (default: all modules, equal ones in one row)",
    )
    kept.add_argument("--png", type=picture, metavar="FILE", help="draw the table to FILE")
    kept.add_argument("--json", type=file, metavar="FILE", help="write the report to FILE as data")
    compared = commands.add_parser(
        "convert-check",
        help="compare a model with its converted copy: errors, other differences, kept memory, peak, step time; "
        "exit status 1 if they differ by more than rounding, 2 if they cannot be compared",
    )
    _add_target(compared)
    compared.add_argument("--recompute", choices=OF_MODELS, help="the level (default: each level in turn)")
    compared.add_argument(
        "--turns",
        type=positive,
        default=5,
        metavar="N",
        help="timed steps of each model (default: 5); with one the noise is unknown",
    )
    compared.add_argument("--png", type=picture, metavar="FILE", help="draw the ratios to FILE")
    compared.add_argument("--json", type=file, metavar="FILE", help="write the results to FILE as data")
    planned = commands.add_parser(
        "plan",
        help="choose a level for each layer, for the fastest step that fits a budget; exit status 1 if none fits",
    )
    _add_target(planned)
    planned.add_argument(
        "--budget",
        type=_budget,
        metavar="BUDGET",
        help='"12GiB", bytes, a fraction of eager\'s peak such as 0.5, or "device" (default: none, the fastest)',
    )
    planned.add_argument("--offload", action="store_true", help="layers may keep their tensors in host memory")
    planned.add_argument("--png", type=picture, metavar="FILE", help="draw time against peak to FILE")
    planned.add_argument("--out", type=file, metavar="FILE", help="write the plan to FILE, for Plan.load")
    kernels = commands.add_parser(
        "inspect",
        help="show the resources of the GPU kernels, compiled without a GPU; exit status 1 if one spills or has no "
        "accesses of 16 bytes",
    )
    kernels.add_argument("--arch", choices=ARCHITECTURES, default="sm_90", help="default: sm_90")
    kernels.add_argument("--columns", type=positive, nargs="+", default=list(COLUMNS), metavar="N", help="row lengths")
    kernels.add_argument(
        "--worst",
        type=positive,
        metavar="N",
        help="show instead the N kernels with the lowest bandwidth relative to a copy, estimated from machine code; "
        "exit status 1 if one in bfloat16 is below target",
    )
    kernels.add_argument(
        "--json", type=file, metavar="FILE", help="write the figures to FILE as data, with --worst also the estimates"
    )
    options = parser.parse_args(arguments)
    if getattr(options, "png", None) and importlib.util.find_spec("matplotlib") is None:
        print("--png needs matplotlib: pip install 'ckpt-kernels[bench]', or matplotlib itself", file=sys.stderr)
        return 2
    if options.command == "inspect":
        return _inspect(options)
    commands_of_targets = {"memory": _memory, "convert-check": _convert_check, "plan": _plan}
    if options.command in commands_of_targets:
        return _run(commands_of_targets[options.command], options)
    text, well = doctor.report()
    _print(text)
    return 0 if well else 1


class _NotWritten(Exception):
    """A result that could not be written, or whose reader has gone."""


def _print(result: Any, end: str = "\n") -> None:
    try:
        print(result, end=end, flush=True)
    except OSError as error:
        # At exit Python would write the rest of the output, and fail again.
        sys.stdout = open(os.devnull, "w")
        raise _NotWritten(f"standard output cannot be written to: {error}") from error


def _write(write: Callable[..., Any], path: pathlib.Path, *arguments: Any) -> None:
    try:
        write(path, *arguments)
    except OSError as error:
        raise _NotWritten(f"{path} cannot be written: {error}") from error


def _run(command: Callable[[nn.Module, Inputs, argparse.Namespace], int], options: argparse.Namespace) -> int:
    """The command's exit status; 2 if the target or its model fails, so that 1 only reports measurements."""
    try:
        model, inputs = load_target(options.target)
        # The target's code may have disabled gradients. The commands measure tensors kept for gradients.
        with torch.enable_grad():
            return command(model, inputs, options)
    except _NotWritten:
        raise  # for `main`
    except TargetError as error:
        print(error, file=sys.stderr)
    # The model may also call sys.exit.
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        print(
            f"{options.command} {options.target}: the model cannot be run so: {type(error).__name__}: {error}",
            file=sys.stderr,
        )
    return 2


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target",
        metavar="MODULE:CALLABLE",
        help="a function without arguments that returns (model, inputs): a module, and its inputs as a tensor, a tuple "
        "of several inputs, or a dict of them by name",
    )


def _memory(model: nn.Module, inputs: Inputs, options: argparse.Namespace) -> int:
    args, kwargs = arguments_of(inputs)
    if options.convert or any(map(is_converted, model.modules())):
        eager = copy_of(model)
        revert(eager)
        if options.convert:
            model = copy_of(eager)
            convert(model, recompute=options.convert)
        title = f"converted, {options.convert}" if options.convert else "converted, as given"
        report = memory.report_beside(eager, model, ("eager", title), args, kwargs)
    else:
        report = memory.report(model, *args, **kwargs)
    _print(report.table(options.depth))
    if options.json:
        _write(report.to_json, options.json)
    if options.png:
        _write(report.draw, options.png, options.depth)
    return 0


def _convert_check(model: nn.Module, inputs: Inputs, options: argparse.Namespace) -> int:
    levels = [options.recompute] if options.recompute else list(OF_MODELS)
    checks = {}
    for level in levels:
        if sys.stderr.isatty():
            print(f"checking recompute={level!r}", file=sys.stderr, flush=True)
        checks[level] = check.check(model, inputs, recompute=level, turns=options.turns)
        _print(checks[level], end="\n\n")
    if options.json:
        _write(functools.partial(check.to_json, checks), options.json)
    if options.png:
        _write(functools.partial(check.draw, checks), options.png)
    return 1 if any(result.changed for result in checks.values()) else 0


def _budget(text: str) -> Budget:
    try:
        bytes_of(None if text == "device" else text, 1, torch.device("cpu"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _plan(model: nn.Module, inputs: Inputs, options: argparse.Namespace) -> int:
    args, kwargs = arguments_of(inputs)
    try:
        bytes_of(options.budget, 1, next((p.device for p in model.parameters()), torch.device("cpu")))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        best_plan = plan(model, *args, budget=options.budget, offload=options.offload, **kwargs)
    except DoesNotFit as error:
        print(error, file=sys.stderr)
        return 1
    _print(best_plan)
    if options.out:
        _write(best_plan.save, options.out)
    if options.png:
        _write(best_plan.draw, options.png)
    return 0


def _inspect(options: argparse.Namespace) -> int:
    if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET"):
        print("inspect needs Triton, and TRITON_INTERPRET not set: its compiler runs here", file=sys.stderr)
        return 2
    if options.worst and not any(arch == options.arch for arch in roofline.ARCH.values()):
        print(f"--worst knows no machine for {options.arch}; expected sm_90 or sm_100", file=sys.stderr)
        return 2
    usages = []
    for usage in inspect.triton_kernels(options.arch, options.columns, work=bool(options.worst)):
        usages.append(usage)
        if sys.stderr.isatty():
            print(f"\r{len(usages)} kernels, {usage.columns} columns", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    libraries = inspect.cuda_library()
    if options.worst:
        _print(inspect.worst(usages, options.arch, options.worst))
        is_well = not inspect.below_target(usages, options.arch)
    else:
        _print(inspect.report(usages, libraries, options.arch))
        is_well = all(usage.sound for usage in usages)
    if options.json:
        _write(pathlib.Path.write_text, options.json, inspect.to_json(usages, libraries, options.arch))
    return 0 if is_well else 1
