"""Compares bounds from the kernels' machine code with measured times.

`python -m benchmarks.predicted benchmarks/results/nvidia-h200/results.json` compiles, without a GPU, the Triton kernels
of the blocks in that file and prints a table: for each pass the share of a copy's bandwidth that `ckpt_kernels.inspect`
estimates and the measured share, both for the bytes that the pass must move. Needs Triton, and not the interpreter.
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

OURS = "ours (triton)"


@dataclass(frozen=True)
class Line:
    """One pass of a block: shares of a copy's bandwidth."""

    block: str
    shape: str
    direction: str
    predicted: float
    binds: str
    measured: float

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


def lines(results: dict[str, Any], only: Collection[int] = ()) -> Iterator[Line]:
    """A line for each pass of our Triton kernels in a known machine's results, only for rows of these lengths."""
    device = results["machine"]["device"]
    machine = next((name for name in MACHINES if name in device), None)
    if machine is None:
        raise ValueError(f"the results are of {device!r}; expected one of {', '.join(MACHINES)}")
    for one in results["results"]:
        if one["provider"] != OURS or one["dtype"] != "bfloat16" or one["case"] not in BY_NAME:
            continue
        columns, block = int(one["shape"].split("x")[-1]), BY_NAME[one["case"]]
        if columns < 128 or (only and columns not in only):
            continue
        for direction, used in kernels(one["case"], columns, ARCH[machine]).items():
            traffic = sum(block.forward if direction == "forward" else block.backward)
            share, binds = predicted(used, 2 * traffic, MACHINES[machine])
            measured = one["copy_ms"] * traffic / 2 / one[f"{direction}_ms"]
            yield Line(one["case"], one["shape"], direction, share, binds, measured)


def table(found: list[Line]) -> str:
    """The table in Markdown, and a line with the errors for each pass."""
    rows = [
        "| block | shape | pass | predicted | binds | measured | off |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows += [
        f"| {one.block} | {one.shape} | {one.direction} | {one.predicted:.2f} | {one.binds} | {one.measured:.2f} | "
        f"{one.off:+.0%} |"
        for one in found
    ]
    for direction in ("forward", "backward"):
        off = [one.off for one in found if one.direction == direction]
        if off:
            mean, size = sum(off) / len(off), sum(map(abs, off)) / len(off)
            rows.append(f"\n{direction}: off by {size:.0%} on average, {mean:+.0%} with its sign, of {len(off)}.")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predicted", description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=existing, help="results.json of a run on a GPU")
    parser.add_argument(
        "--columns", type=positive, nargs="+", default=[], metavar="N", help="rows of these lengths only"
    )
    parser.add_argument("--out", type=file, help="write the table there, too")
    options = parser.parse_args()
    found = [line for file in options.results for line in lines(json.loads(file.read_text()), options.columns)]
    print(table(found))
    if options.out:
        options.out.write_text(table(found) + "\n")


if __name__ == "__main__":
    main()
