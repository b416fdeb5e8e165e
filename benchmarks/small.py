"""Measures the overhead of calls on tensors so small that the kernels do not matter: every block against eager torch.

    python -m benchmarks.small [--seconds 1.5] [--out results/cpu/small.md]

A step is forward and backward of a module at (8, 64) in float32, by `autograd.grad` for the inputs and all parameters,
on one thread of the CPU. Times are lower quartiles of short runs, eager and ours in turn. The table also counts the
Python functions of this package that a step enters.
"""

import argparse
import copy
import datetime
import functools
import itertools
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ckpt_kernels
import ckpt_kernels.nn as ours
from ckpt_kernels import functional, recompute
from ckpt_kernels.cli_arguments import amount

WIDTH = 64
_PACKAGE = str(pathlib.Path(ckpt_kernels.__file__).parent)


class Small(NamedTuple):
    """A block: ours and eager torch's version are called with `tensors` tensors of (8, 64), or of the given shape."""

    name: str
    ours: Callable[..., object]
    eager: Callable[..., object]
    tensors: int = 1
    shape: tuple[int, ...] = (8, WIDTH)


class Composed(nn.Module):
    """A module that calls a function, for blocks that are several calls in eager torch."""

    def __init__(self, function: Callable[..., object], *modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.parts = nn.ModuleList(modules)

    def forward(self, *tensors: Tensor) -> object:
        return self.function(*self.parts, *tensors)


class GatedMLP(nn.Module):
    """A gated MLP as models write it."""

    def __init__(self, gate: nn.Linear, up: nn.Linear, down: nn.Linear) -> None:
        super().__init__()
        self.gate, self.up, self.down = gate, up, down
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


def _mlp(first: nn.Module, second: nn.Module, x: Tensor) -> Tensor:
    return second(F.gelu(first(x)))


def _gated_mlp(gate: nn.Module, up: nn.Module, down: nn.Module, x: Tensor) -> Tensor:
    return down(F.silu(gate(x)) * up(x))


def _packed(x: Tensor) -> Tensor:
    gate, value = x.chunk(2, -1)
    return F.silu(gate) * value


def _add_norm(norm: nn.Module, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    total = residual + x
    return norm(total), total


def blocks() -> Sequence[Small]:
    n, images = WIDTH, (2, 16, 4, 4)
    norm, rms = nn.LayerNorm, nn.RMSNorm
    return (
        Small("LayerNorm", ours.LayerNorm(n), norm(n)),
        Small("LayerNorm, gelu", ours.LayerNorm(n, activation="gelu"), Composed(lambda m, x: F.gelu(m(x)), norm(n))),
        Small("RMSNorm", ours.RMSNorm(n), rms(n)),
        Small("RMSNorm, silu", ours.RMSNorm(n, activation="silu"), Composed(lambda m, x: F.silu(m(x)), rms(n))),
        Small("AddLayerNorm", ours.AddLayerNorm(n), Composed(_add_norm, norm(n)), 2),
        Small("AddRMSNorm", ours.AddRMSNorm(n), Composed(_add_norm, rms(n)), 2),
        Small(
            "AddLayerNorm, dropout",
            ours.AddLayerNorm(n, dropout=0.1),
            Composed(lambda m, x, r: _add_norm(m, F.dropout(x, 0.1), r), norm(n)),
            2,
        ),
        Small("GatedRMSNorm", ours.GatedRMSNorm(n), Composed(lambda m, x, g: m(x) * F.silu(g), rms(n)), 2),
        Small(
            "ModulatedLayerNorm",
            ours.ModulatedLayerNorm(n, elementwise_affine=False),
            Composed(lambda m, x, scale, shift: m(x) * (1 + scale) + shift, norm(n, elementwise_affine=False)),
            3,
        ),
        Small("BatchNorm1d", ours.BatchNorm1d(n), nn.BatchNorm1d(n)),
        Small(
            "BatchNorm2d, relu",
            ours.BatchNorm2d(16, activation="relu"),
            Composed(lambda m, x: F.relu(m(x)), nn.BatchNorm2d(16)),
            shape=images,
        ),
        Small("GroupNorm", ours.GroupNorm(8, n), nn.GroupNorm(8, n)),
        Small(
            "GroupNorm, silu",
            ours.GroupNorm(4, 16, activation="silu"),
            Composed(lambda m, x: F.silu(m(x)), nn.GroupNorm(4, 16)),
            shape=images,
        ),
        Small("InstanceNorm2d", ours.InstanceNorm2d(16), nn.InstanceNorm2d(16), shape=images),
        Small("silu", lambda x: functional.bias_act(x, activation="silu"), F.silu),
        Small("gelu", lambda x: functional.bias_act(x, activation="gelu"), F.gelu),
        Small("relu", lambda x: functional.bias_act(x, activation="relu"), F.relu),
        Small(
            "BiasAct, gelu",
            _with_bias(ours.BiasAct(n, activation="gelu")),
            Composed(lambda m, x: F.gelu(x + m.bias), _with_bias(ours.BiasAct(n))),
        ),
        Small("glu, silu", lambda g, v: functional.glu(g, v), lambda g, v: F.silu(g) * v, 2),
        Small("packed_glu, silu", lambda x: functional.packed_glu(x), _packed),
        Small("GLU", ours.GLU(), nn.GLU()),
        Small("NormLinear", ours.NormLinear(n, n), Composed(lambda m, a, x: a(m(x)), norm(n), nn.Linear(n, n))),
        Small("ActLinear", ours.ActLinear(n, n), Composed(lambda m, x: m(F.gelu(x)), nn.Linear(n, n))),
        Small("MLP", ours.MLP(n, 128), Composed(_mlp, nn.Linear(n, 128), nn.Linear(128, n))),
        Small(
            "GatedMLP",
            ours.GatedMLP(n, 128),
            Composed(_gated_mlp, *(nn.Linear(n, 128, bias=False) for _ in range(2)), nn.Linear(128, n, bias=False)),
        ),
    )


def _with_bias(module: nn.Module) -> nn.Module:
    nn.init.normal_(module.bias)
    return module


def step(block: Callable[..., object], tensors: Sequence[Tensor], weights: Sequence[Tensor] = ()) -> Callable[[], None]:
    """A forward and backward pass for all tensors that need a gradient, and for `weights` if the block is no module."""
    parameters = list(block.parameters()) if isinstance(block, nn.Module) else weights
    wanted = [*tensors, *parameters]
    outputs = block(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = [torch.randn_like(output) for output in outputs]

    def run() -> None:
        torch.autograd.grad(block(*tensors), wanted, gradients if len(gradients) > 1 else gradients[0])

    return run


def own_calls(function: Callable[[], object]) -> int:
    """The number of Python functions of this package that a call enters."""
    count = 0

    def see(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(_PACKAGE)

    sys.setprofile(see)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def quartiles(steps: Sequence[Callable[[], None]], seconds: float, calls: int = 3) -> list[float]:
    """Lower quartiles of the microseconds of each step, in turn, after a warm-up. Other programs affect these least."""
    for run in steps:
        for _ in range(20):
            run()
    times: list[list[float]] = [[] for _ in steps]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for run, each in zip(steps, times, strict=True):
            run()
            start = time.perf_counter()
            for _ in range(calls):
                run()
            each.append((time.perf_counter() - start) / calls * 1e6)
    return [statistics.quantiles(each, n=4)[0] for each in times]


def table(seconds: float) -> str:
    lines = ["| block | eager, us | ours, us | ratio | own calls |", "|---|---|---|---|---|"]
    for block in blocks():
        tensors = [torch.randn(block.shape, requires_grad=True) for _ in range(block.tensors)]
        eager, mine = step(block.eager, tensors), step(block.ours, tensors)
        eager_time, our_time = quartiles((eager, mine), seconds)
        ratio = our_time / eager_time
        lines.append(f"| {block.name} | {eager_time:.1f} | {our_time:.1f} | {ratio:.2f} | {own_calls(mine)} |")
    return "\n".join(lines)


def discarding(seconds: float) -> str:
    """The time that `discard_outputs` adds to a norm and a Linear that reads the norm."""
    layer = nn.Sequential(ours.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH))
    eager = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH))
    x = torch.randn(8, WIDTH, requires_grad=True)
    steps = step(eager, [x]), step(layer, [x]), step(recompute.DiscardOutputs(layer), [x])
    eager_time, kept, let_go = quartiles(steps, 2 * seconds)
    return (
        f"LayerNorm and Linear: eager {eager_time:.1f} us, ours {kept:.1f} us, within `discard_outputs` "
        f"{let_go:.1f} us, {let_go - kept:.1f} more."
    )


def converted(seconds: float) -> str:
    """The time of a converted gated MLP beside the same op called by hand: alone, and as a part of a model."""
    lines = [
        "| level | dtype | pass | eager, us | by hand, us | converted | in a model |",
        "|---|---|---|---|---|---|---|",
    ]
    for level, dtype in itertools.product(("block", "output"), (torch.float32, torch.bfloat16)):
        gate, up = (nn.Linear(WIDTH, 128, bias=False, dtype=dtype) for _ in range(2))
        eager = GatedMLP(gate, up, nn.Linear(128, WIDTH, bias=False, dtype=dtype))
        alone, part = copy.deepcopy(eager), nn.Sequential(copy.deepcopy(eager))
        for model in (alone, part):
            ckpt_kernels.convert(model, recompute=level)
        weights = [linear.weight for linear in (eager.gate, eager.up, eager.down)]

        def by_hand(x: Tensor, weights: Sequence[Tensor] = weights, level: str = level) -> Tensor:
            return functional.gated_mlp(x, *weights, recompute=level)

        x = torch.randn(4, WIDTH, dtype=dtype, requires_grad=True)
        calls = eager, by_hand, alone, part[0]
        both = quartiles([step(call, [x], weights if call is by_hand else ()) for call in calls], seconds)
        with torch.no_grad():
            forward = quartiles([functools.partial(call, x) for call in calls], seconds)
        for name, times in (("both", both), ("no_grad", forward)):
            more = [f"+{each - times[1]:.1f}" for each in times[2:]]
            row = [level, str(dtype).removeprefix("torch."), name, *(f"{each:.1f}" for each in times[:2]), *more]
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown processor"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.small", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=amount, default=1.5, help="for each block")
    parser.add_argument("--out", type=pathlib.Path, help="a Markdown file, beside this one where relative")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = table(arguments.seconds)
    today = datetime.datetime.now(datetime.timezone.utc).date()
    load = f"load {os.getloadavg()[0]:.0f} on {os.cpu_count()} processors" if hasattr(os, "getloadavg") else ""
    head = f"{processor()}, {load}, torch {torch.__version__}, one thread, {today}; `python -m benchmarks.small`"
    text = f"# Small calls\n\nForward and backward, lower quartiles of runs in turn. {head}.\n\n{found}\n\n"
    text += discarding(arguments.seconds) + "\n\n"
    text += f"A gated MLP at (4, {WIDTH}), converted, and by hand:\n\n{converted(arguments.seconds)}\n"
    print(text)
    if arguments.out:
        (pathlib.Path(__file__).parent / arguments.out).write_text(text)


if __name__ == "__main__":
    main()
