"""Compares bounds from the kernels' machine code with measured times.

`python -m benchmarks.predicted benchmarks/results/nvidia-h200/results.json` compiles, without a GPU, the Triton kernels
of the blocks in that file and prints a table: for each pass the share of a copy's bandwidth that `ckpt_kernels.inspect`
estimates and the measured share, both for the bytes that the pass must move. Needs Triton, and not the interpreter.
`--provider` compares the kernels of Liger-Kernel, if installed, or those that torch.compile writes.
"""

import argparse
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ckpt_kernels.catalogue.blocks import BY_NAME
from ckpt_kernels.cli_arguments import existing, file, positive
from ckpt_kernels.inspect import MACHINES, Machine, Usage, estimate
from ckpt_kernels.inspect.kernels import usage
from ckpt_kernels.inspect.roofline import ARCH

OURS, LIGER, INDUCTOR = "ours (triton)", "Liger", "torch.compile"


@dataclass(frozen=True)
class Line:
    """One pass of a block: shares of a copy's bandwidth, and the bytes a thread that the kernels spill."""

    block: str
    shape: str
    direction: str
    predicted: float
    binds: str
    measured: float
    spills: int

    @property
    def off(self) -> float:
        """The error of the prediction, as a fraction of the measured share."""
        return self.predicted / self.measured - 1


def kernels(name: str, columns: int, arch: str) -> dict[str, list[Usage]]:
    """The kernels of a block in bfloat16, compiled, by pass."""
    from ckpt_kernels.inspect.variants import block_operands, launches, variant

    found = {}
    for direction, launched in launches(BY_NAME[name].call, block_operands(name, columns, torch.bfloat16)).items():
        variants = [variant(f"{name} {direction}", one, columns) for one in launched]
        found[direction] = [usage(each, "bf16", columns, arch, work=True) for each in variants]
    return found


def predicted(used: list[Usage], floor: int, machine: Machine) -> tuple[float, str]:
    """The share of a copy's bandwidth of a pass that must move `floor` bytes for each element, and the limit that binds
    the slowest kernel."""
    times = []
    for one in used:
        assert one.work is not None
        found = estimate(one.work, machine)
        times.append((one.work.memory / found.share, found.binds))
    return floor / sum(time for time, _ in times), max(times)[1]


def lines(results: dict[str, Any], only: Collection[int] = (), provider: str = OURS) -> Iterator[Line]:
    """A line for each pass of a provider's Triton kernels in a known machine's results, only for rows of these lengths.

    Reads the results of `benchmarks` and of `benchmarks.kernels`. The latter has our weights in float32; the compiled
    kernels have bfloat16.
    """
    device = results["machine"]["device"]
    machine = next((name for name in MACHINES if name in device), None)
    if machine is None:
        raise ValueError(f"the results are of {device!r}; expected one of {', '.join(MACHINES)}")
    for one in results["results"]:
        name = one.get("case") or one["block"]
        if one["provider"] != provider or one.get("dtype", "bfloat16") != "bfloat16" or name not in BY_NAME:
            continue
        shape, block = one.get("shape") or f"{one['rows']}x{one['columns']}", BY_NAME[name]
        rows, columns = (int(size) for size in shape.split("x")[-2:])
        if columns < 128 or (only and columns not in only):
            continue
        for direction, used in _compiled(provider, name, rows, columns, ARCH[machine]).items():
            traffic = sum(block.forward if direction == "forward" else block.backward)
            share, binds = predicted(used, 2 * traffic, MACHINES[machine])
            measured = one["copy_ms"] * traffic / 2 / one[f"{direction}_ms"]
            yield Line(name, shape, direction, share, binds, measured, max(kernel.stack for kernel in used))


def _compiled(provider: str, name: str, rows: int, columns: int, arch: str) -> dict[str, list[Usage]]:
    if provider == OURS:
        return kernels(name, columns, arch)
    if provider == LIGER:
        from .liger_kernels import liger_kernels

        return liger_kernels(name, rows, columns, arch)
    from .inductor_kernels import inductor_kernels

    return inductor_kernels(name, rows, columns, arch)


def table(found: list[Line]) -> str:
    """The table in Markdown, and lines with the errors for each pass: of all kernels, and of those without spills."""
    rows = [
        "| block | shape | pass | predicted | binds | measured | off | spills |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows += [
        f"| {one.block} | {one.shape} | {one.direction} | {one.predicted:.2f} | {one.binds} | {one.measured:.2f} | "
        f"{one.off:+.0%} | {one.spills or '-'} |"
        for one in found
    ]
    for direction in ("forward", "backward"):
        own = [one for one in found if one.direction == direction]
        rows += errors(direction, own)
        if any(one.spills for one in own):
            rows += errors(f"{direction} without spills", [one for one in own if not one.spills])
    return "\n".join(rows)


def errors(kind: str, found: list[Line]) -> list[str]:
    """A line with the average and the largest error, or none if there is nothing to compare."""
    off = [one.off for one in found]
    if not off:
        return []
    mean, size, most = sum(off) / len(off), sum(map(abs, off)) / len(off), max(off, key=abs)
    return [f"\n{kind}: off by {size:.0%} on average, {mean:+.0%} with its sign, {most:+.0%} at most, of {len(off)}."]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predicted", description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=existing, help="results.json of a run on a GPU")
    parser.add_argument(
        "--columns", type=positive, nargs="+", default=[], metavar="N", help="rows of these lengths only"
    )
    parser.add_argument(
        "--provider", choices=[OURS, LIGER, INDUCTOR], default=OURS, help="whose kernels (default: %(default)s)"
    )
    parser.add_argument("--out", type=file, help="write the table there, too")
    options = parser.parse_args()
    results = [json.loads(file.read_text()) for file in options.results]
    try:
        found = [line for one in results for line in lines(one, options.columns, options.provider)]
    except ModuleNotFoundError as error:
        print(f"{options.provider} is not compared: {error}")
        return
    print(table(found))
    if options.out:
        options.out.write_text(table(found) + "\n")


if __name__ == "__main__":
    main()
