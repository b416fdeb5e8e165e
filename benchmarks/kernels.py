"""`python -m benchmarks.kernels`: row-norm kernels alone, without autograd, on each backend, beside those of peers.

A backend's kernels are called directly. Eager torch's and peers' backward passes run by autograd. Operands are in
bfloat16, weights in float32 (eager's and Liger's in bfloat16). Several sets of operands take turns, so that none is in
cache when its turn comes; times are medians. The floor is the time of a plain copy of the same run, times the tensors
that must cross memory: two forward, three backward.
"""

import argparse
import datetime
import importlib
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as TF

from ckpt_kernels import backends
from ckpt_kernels.backends.blocks import RowNorm, RowNormGradients, RowNormOptions
from ckpt_kernels.cli_arguments import file, positive

from . import report
from .measure import Stopwatch, buffer_count
from .peers import PEERS

BLOCKS: dict[str, dict[str, Any]] = {
    "layer_norm": {"centered": True},
    "layer_norm+gelu": {"centered": True, "activation": "gelu"},
    "rms_norm": {"centered": False},
}
ELEMENTS = {"cuda": 2**26, "cpu": 2**21}
EPS = 1e-6


class Operands:
    """A block with memory for the output and the gradients."""

    def __init__(self, name: str, rows: int, columns: int, device: str) -> None:
        options = RowNormOptions(columns, EPS, **BLOCKS[name])

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, device=device)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device=device)

        self.input, self.grad_output = (random(rows, columns).bfloat16() for _ in range(2))
        bias = random(columns) if options.centered else None
        mean = empty(rows) if options.centered else None
        self.block = RowNorm(
            self.input, None, None, random(columns).abs() + 0.5, bias, None, mean, empty(rows), options
        )
        self.output = torch.empty_like(self.input)
        grad_bias = None if bias is None else empty(columns)
        self.gradients = RowNormGradients(torch.empty_like(self.input), None, None, empty(columns), grad_bias)


def milliseconds(call: Callable[[Operands], object], sets: Sequence[Operands], device: str, rounds: int) -> float:
    """The median time of a call, over rounds of one call for each set of operands."""
    times = []
    for round in range(rounds + 2):
        watch = Stopwatch(device)
        for operands in sets:
            call(operands)
        watch.mark()
        if round >= 2:
            times.append(watch.between()[0] / len(sets))
    return statistics.median(times)


def providers(name: str, columns: int, device: str) -> Iterator[tuple[str, Callable, Callable]]:
    """(name, forward, backward) of each provider."""
    for backend in backends.NAMES:
        if backend == "reference" or backends.why_not(backend, device, torch.bfloat16) is not None:
            continue
        module = importlib.import_module(f"ckpt_kernels.backends.{backend}")
        functions: Any = getattr(module, "row_norm", module)
        yield (
            f"ours ({backend})",
            lambda o, f=functions: f.row_norm_forward(o.block, o.output, None),
            lambda o, f=functions: f.row_norm_backward(o.block, o.grad_output, None, o.gradients),
        )
    if name != "rms_norm":
        return
    calls = {"eager": lambda x, w: (TF.rms_norm(x, (columns,), w, EPS),)}
    for peer, find in PEERS.items():
        try:
            calls[peer] = find("rms_norm") if device == "cuda" else None
        except ImportError:
            continue
    for peer, call in calls.items():
        if call is not None:
            yield peer, *_by_autograd(call, columns, device, torch.float32 if peer == "quack" else torch.bfloat16)


def _by_autograd(call: Callable, columns: int, device: str, weights: torch.dtype) -> tuple[Callable, Callable]:
    weight = torch.ones(columns, device=device, dtype=weights, requires_grad=True)
    graphs: dict[int, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def forward(operands: Operands) -> None:
        call(operands.input, weight)

    def backward(operands: Operands) -> None:
        if id(operands) not in graphs:
            x = operands.input.detach().requires_grad_()
            graphs[id(operands)] = x, call(x, weight)[0]
        x, y = graphs[id(operands)]
        torch.autograd.grad(y, (x, weight), operands.grad_output, retain_graph=True)

    return forward, backward


def measured(name: str, columns: int, device: str, rounds: int) -> Iterator[dict[str, Any]]:
    """The figures of each provider for a block and a length of rows."""
    rows = ELEMENTS[device] // columns
    count = buffer_count(4 * 2 * ELEMENTS[device])
    sets = [Operands(name, rows, columns, device) for _ in range(count)]
    copy = milliseconds(lambda o: o.output.copy_(o.input), sets, device, rounds)
    for provider, forward, backward in providers(name, columns, device):
        times = [milliseconds(call, sets, device, rounds) for call in (forward, backward)]
        yield {
            **{"block": name, "rows": rows, "columns": columns, "provider": provider, "copy_ms": copy},
            **{"forward_ms": times[0], "backward_ms": times[1]},
            **{"forward_share": copy / times[0], "backward_share": 1.5 * copy / times[1]},
        }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--columns", type=positive, nargs="+", default=[512, 1024, 4096, 5120, 8192, 16384])
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--json", type=file)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    command = " ".join(["python -m benchmarks.kernels", *sys.argv[1:]])
    about = report.machine(command, datetime.date.today().isoformat())
    table = Table("block", "shape", "provider", "forward us", "of the copy", "backward us", "of the copy")
    results: list[dict[str, Any]] = []
    console = Console(width=None if sys.stdout.isatty() else 120)
    for columns in given.columns:
        for name in BLOCKS:
            for one in measured(name, columns, device, given.rounds):
                results.append(one)
                shape = f"{one['rows']}x{columns}"
                passes = [(one[f"{p}_ms"], one[f"{p}_share"]) for p in ("forward", "backward")]
                table.add_row(
                    name, shape, one["provider"], *(t for ms, s in passes for t in (f"{ms * 1e3:.1f}", f"{s:.2f}"))
                )
            table.add_section()
        console.print(f"{columns} columns measured")
    console.print(table)
    if given.json:
        given.json.write_text(json.dumps({"machine": about, "results": results}, indent=1))


if __name__ == "__main__":
    main()
