"""Times a training step on the CPU, with the C library's defaults and with freed memory kept.

`python -m benchmarks.freed_memory` runs two layers of a transformer, unconverted and converted, with each setting in
a process of its own. The table shows milliseconds and page faults of a step, and resident memory. With one thread the
time is processor time, which excludes other work on the machine.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from torch import nn

import ckpt_kernels
from ckpt_kernels import memory
from ckpt_kernels.cli_arguments import positive

SETTINGS = ("defaults", "kept")
MODELS = ("eager", "converted")


def model(converted: bool) -> nn.Module:
    """Two layers of width 256 with an inner width of 1,024."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        256, 4, dim_feedforward=1024, dropout=0.1, activation="gelu", batch_first=True, norm_first=True
    )
    made = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    if converted:
        ckpt_kernels.convert(made, recompute="block")
    return made


def measured(name: str, setting: str, steps: int) -> dict[str, float]:
    """Medians over the steps of one process, without the first."""
    if setting == "kept" and not memory.keep_freed_memory():
        raise RuntimeError("freed memory cannot be kept here: the C library is not glibc")
    torch.set_num_threads(1)
    made, batch = model(name == "converted"), torch.randn(32, 256, 256)
    optimizer = torch.optim.SGD(made.parameters(), lr=1e-3)
    times, faults = [], []
    for _ in range(steps + 1):
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.process_time()
        optimizer.zero_grad()
        made(batch).square().mean().backward()
        optimizer.step()
        times.append((time.process_time() - began) * 1e3)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"ms": statistics.median(times[1:]), "faults": statistics.median(faults[1:]), "peak_mib": peak}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.freed_memory", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=positive, default=4, help="of each process, after one that is not counted")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "SETTING"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, setting = options.one
        print(json.dumps(measured(name, setting, options.steps)))
        return
    print("| model | freed memory | ms a step | page faults a step | peak of the process, MiB |")
    print("| --- | --- | --- | --- | --- |")
    for name in MODELS:
        for setting in SETTINGS:
            command = [sys.executable, "-m", "benchmarks.freed_memory", "--one", name, setting, "--steps"]
            done = subprocess.run([*command, str(options.steps)], capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            print(f"| {name} | {setting} | {found['ms']:.0f} | {found['faults']:.0f} | {found['peak_mib']:.0f} |")


if __name__ == "__main__":
    main()
