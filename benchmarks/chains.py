"""`python -m benchmarks.chains`: a plan for many narrow layers beside the square-root rule, at the peak of the rule.

The rule (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016) checkpoints n layers in stretches of the
square root of n, by torch's checkpoint. Most of the time of such layers is that of calls in Python. All steps run on
one thread, and take turns; the figures are medians of processor time, to which other work of the machine adds less, and
the added time is the median difference from eager's step of the same turn.

Two costs that chance assigns to one model or another are left out. The C library returns the top of its heap to the
system if no tensor lies there, and page faults then take up to a tenth of a step; so no memory is returned. Python's
garbage collector would also visit the objects of all other models; so these are exempt.
"""

import argparse
import copy
import ctypes
import datetime
import functools
import gc
import json
import math
import statistics
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ckpt_kernels
from ckpt_kernels import memory
from ckpt_kernels.cli_arguments import file, positive

from . import report as reports


class Block(nn.Module):
    """A narrow MLP with a norm and a residual connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Chain(nn.Module):
    """Blocks, one after the other.

    Args:
        layers: the number of blocks.
        width: their width.
        stretch: the number of adjacent blocks that share one of torch's checkpoints; 0 is none.
    """

    def __init__(self, layers: int, width: int, stretch: int = 0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.stretch = stretch

    def forward(self, x: Tensor) -> Tensor:
        if not self.stretch:
            return self._run(0, len(self.layers), x)
        for first in range(0, len(self.layers), self.stretch):
            run = functools.partial(self._run, first, first + self.stretch)
            x = checkpoint(run, x, use_reentrant=False)
        return x

    def _run(self, first: int, end: int, x: Tensor) -> Tensor:
        for index in range(first, min(end, len(self.layers))):
            x = self.layers[index](x)
        return x


def by_the_rule(chain: Chain) -> Chain:
    """A copy of the chain in checkpoints over stretches of the square root of the number of blocks."""
    ruled = copy.deepcopy(chain)
    ruled.stretch = math.isqrt(len(chain.layers))
    return ruled


def peak(model: nn.Module, x: Tensor) -> int:
    """The peak in bytes of a step that accumulates into existing gradients."""
    _step(model, x)
    return memory.peak_bytes(lambda: _step(model, x))


def run(options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    model, x = Chain(options.layers, options.width), torch.randn(options.rows, options.width, requires_grad=True)
    models = {"eager": model, "rule": by_the_rule(model)}
    budget = peak(models["rule"], x)
    start = time.process_time()
    plan = ckpt_kernels.plan(model, x, budget=budget)
    planning = time.process_time() - start
    models["plan"] = copy.deepcopy(model)
    plan.apply(models["plan"])
    peaks = {name: peak(each, x) for name, each in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    gc.collect()
    gc.freeze()
    for _ in range(options.rounds):
        for name, each in models.items():
            start = time.process_time()
            _step(each, x)
            seconds[name].append(time.process_time() - start)
    gc.unfreeze()
    rows = {}
    for name, own in seconds.items():
        added = [one - eager for one, eager in zip(own, seconds["eager"], strict=True)]
        quarters = statistics.quantiles(added, n=4) if len(added) > 1 else [*added, *added, *added]
        rows[name] = {"peak": peaks[name] / peaks["eager"], "seconds": statistics.median(own), "all": own}
        rows[name] |= {"added": statistics.median(added), "added quarters": [quarters[0], quarters[2]]}
        spread = f"{min(own):.3f} to {max(own):.3f}"
        print(
            f"{name:6} peak {peaks[name] / peaks['eager']:.4f}  {statistics.median(own):.3f} s ({spread})  "
            f"added {statistics.median(added):.3f} s (half of the turns {quarters[0]:.3f} to {quarters[2]:.3f})",
            flush=True,
        )
    print(f"predicted {plan.predicted.seconds:.3f} s, planned in {planning:.0f} s and {plan.count} steps", flush=True)
    for line in str(plan).splitlines():
        print(line)
    found = {"rows": rows, "predicted": plan.predicted.seconds, "planning": planning, "steps": plan.count}
    return found | {"layers": options.layers, "width": options.width, "tokens": options.rows}


def keep_memory() -> None:
    """Let the C library keep all freed memory, where it is glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # The thresholds for trimming the heap and for memory of the system's own, as malloc.h numbers them.
        mallopt(-1, 2**31 - 1)
        mallopt(-3, 2**25)


def _step(model: nn.Module, x: Tensor) -> None:
    model(x).sum().backward()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chains", description=__doc__)
    parser.add_argument("--layers", type=positive, default=1000)
    parser.add_argument("--width", type=positive, default=64)
    parser.add_argument("--rows", type=positive, default=128)
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--json", type=file)
    options = parser.parse_args()
    command = " ".join(["python -m benchmarks.chains", *sys.argv[1:]])
    torch.set_num_threads(1)
    keep_memory()
    found = {"machine": reports.machine(command, datetime.date.today().isoformat()), **run(options)}
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
