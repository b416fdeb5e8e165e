"""What the machine code of the kernels allows, beside what was measured of them.

`python -m benchmarks.predicted benchmarks/results/nvidia-h200/results.json` compiles, without a GPU, the Triton kernels
of the blocks in that file and prints a table: of each pass the share of a copy's bandwidth that `ckpt_kernels.inspect`
estimates and the one that was measured, both of the bytes that the pass has to move. Needs Triton, not in its
interpreter.
"""

import argparse
import json
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ckpt_kernels.backends.blocks import RowNorm, RowNormGradients, RowNormOptions
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
        """How far the prediction is off, of what was measured."""
        return self.predicted / self.measured - 1


def _calls(name: str, columns: int, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """What a block launches in either pass, with tensors of torch's meta device; empty where that is not known here."""
    from ckpt_kernels.backends import triton as backend
    from ckpt_kernels.backends.triton.variants import ROWS, meta_tensor

    x = meta_tensor(ROWS, columns, dtype=dtype)
    if name == "glu (silu)":
        return {
            "forward": lambda: backend.glu_forward(x, x, x, "silu"),
            "backward": lambda: backend.glu_backward(x, x, x, x, x, None, "silu"),
        }
    known = re.fullmatch(r"(add_)?(layer|rms)_norm(?:\+(\w+))?", name)
    if not known:
        return {}
    added, kind, activation = known.groups()
    w, sums, row = meta_tensor(columns, dtype=dtype), meta_tensor(columns), meta_tensor(ROWS)
    options = RowNormOptions(columns, 1e-5, kind == "layer")._replace(activation=activation or "identity")
    bias, mean, db = (w, row, sums) if kind == "layer" else (None, None, None)
    block, total = RowNorm(x, x if added else None, None, w, bias, None, mean, row, options), x if added else None
    kept, gradients = block._replace(residual=None), RowNormGradients(x, None, None, sums, db)
    return {
        "forward": lambda: backend.row_norm_forward(block, x, total),
        "backward": lambda: backend.row_norm_backward(kept, x, total, gradients),
    }


def kernels(name: str, columns: int, arch: str) -> dict[str, list[Usage]]:
    """The kernels of a block in bfloat16, compiled, by pass."""
    from ckpt_kernels.backends.triton import launch
    from ckpt_kernels.backends.triton.sums import column_sums_kernel
    from ckpt_kernels.backends.triton.variants import ROWS, Variant

    found = {}
    for direction, call in _calls(name, columns, torch.bfloat16).items():
        launch.recorded.clear()
        call()
        launched = [one for one in launch.recorded if one.kernel is not column_sums_kernel]
        variants = [Variant(f"{name} {direction}", one, ROWS * columns) for one in launched]
        found[direction] = [usage(variant, "bf16", columns, arch, work=True) for variant in variants]
    return found


def predicted(used: list[Usage], floor: int, machine: Machine) -> tuple[float, str]:
    """The share of a copy's bandwidth of a pass that has to move `floor` bytes an element, and what binds its slowest
    kernel."""
    times = []
    for one in used:
        assert one.work is not None
        found = estimate(one.work, machine)
        times.append((one.work.memory / found.share, found.binds))
    return floor / sum(time for time, _ in times), max(times)[1]


def lines(results: dict[str, Any], only: Collection[int] = ()) -> Iterator[Line]:
    """One for each pass of our Triton kernels in a file of a known machine's results, of rows of these lengths only."""
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
    """In Markdown, and the errors in one line each for either pass."""
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
