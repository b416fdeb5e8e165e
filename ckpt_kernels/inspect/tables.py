"""Formats the output of `inspect` as tables and as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from .binary import Library
from .kernels import PROCESSORS, SIZES, Usage
from .roofline import ARCH, MACHINES, Estimate, Work, estimate, target

_LEGEND = (
    "columns: the length of a row. warps: a thread block. registers: a thread. spills: bytes a thread, which should",
    "be 0. shared: bytes of shared memory a thread block. occupancy: the share of a multiprocessor's warps that",
    "registers and shared memory leave room for. instructions: of the PTX, or of an AMD kernel's assembly.",
    "accesses: the widths in bytes of the accesses to global memory; 16 should be among them.",
    "tensors: the bytes of all 16-byte accesses, each counted once, over the bytes of a tile; weights, which all",
    "programs share, and partial sums count too. floor: operands as large as the input.",
)
_LEGEND_OF_ESTIMATES = (
    "Estimates, not measured: the share of a copy's bandwidth that the machine code allows, worst first;",
    "docs/roofline.md describes the model and compares estimates with measurements. binds: the tightest limit.",
    "steady: instructions an element in the loop over elements; all: the same, plus instructions once a program.",
    "fp32, integer, special, load/store: the instructions of the loop by pipe. programs: resident on a",
    "multiprocessor. flight, needed: KiB of loads that a multiprocessor has in flight, and KiB that hide the latency.",
    "passes: how often a large operand is read. target: 95% forward and 88% backward, in bfloat16.",
)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def report(usages: Sequence[Usage], libraries: Sequence[Library], arch: str) -> str:
    """Return the resources of kernels as a table with a legend."""
    processor = PROCESSORS[arch]
    head = ("kernel", "columns", "dtype", "warps", "registers", "spills", "shared", "occupancy", "instructions")
    rows = [(*head, "accesses", "tensors", "floor", "estimate")]
    for usage in usages:
        # The time for operands of 2**26 elements at the published bandwidth.
        seconds = usage.floor * (SIZES[usage.dtype] << 26) / (processor.bandwidth * 1e9)
        rows.append(
            (
                usage.name,
                str(usage.columns),
                usage.dtype,
                str(usage.warps),
                str(usage.registers),
                str(usage.stack + usage.local),
                str(usage.shared),
                f"{usage.occupancy:.0%}",
                str(usage.instructions),
                "/".join(map(str, usage.widths)),
                f"{usage.tensors:.2f}",
                str(usage.floor),
                f"{seconds * 1e3:.3f} ms",
            )
        )
    bad = [usage for usage in usages if not usage.sound]
    lines = [
        *_table(rows),
        "",
        f"{len(usages)} kernels for {arch}, of which {len(bad)} spill or have no accesses of 16 bytes.",
        *_LEGEND,
        f"estimate, not measured: what the floor takes for 2**26 elements at the published bandwidth of a "
        f"{processor.card}, {processor.bandwidth} GB/s.",
    ]
    lines += [
        f"CUDA library, {one.arch}: {one.kernels} kernels, at most {one.registers} registers; {one.with_stack} have a "
        f"stack, of at most {one.stack} bytes."
        for one in libraries
    ] or ["CUDA library: not built."]
    return "\n".join(lines)


def estimates(usage: Usage, arch: str) -> dict[str, Estimate]:
    """Return the estimates for the machines that run `arch`, by name; empty if the kernel's work was not analysed."""
    if usage.work is None:
        return {}
    return {name: estimate(usage.work, machine) for name, machine in MACHINES.items() if ARCH[name] == arch}


def below_target(usages: Sequence[Usage], arch: str) -> list[Usage]:
    """Return the bfloat16 kernels with an estimate below target, worst first.

    The estimate is for the machine with the most memory bandwidth a clock, where the target is the hardest to reach.
    """
    hardest = _machines(arch)[-1]
    aimed = [usage for usage in usages if usage.dtype == "bf16"]
    return [usage for usage in _worst_first(aimed, arch) if _to_target(usage, hardest) < 1]


def worst(usages: Sequence[Usage], arch: str, count: int) -> str:
    """Return a table of the kernels with the lowest estimates.

    Args:
        usages: kernels compiled with `work=True`.
        arch: the architecture that the kernels were compiled for, "sm_90" or "sm_100".
        count: the number of rows.

    Returns:
        The table with a legend.
    """
    machines = _machines(arch)
    rows: list[Sequence[str]] = [
        (
            *("kernel", "columns", "dtype", *machines, "binds", "steady", "all", "fp32", "integer", "special"),
            *("load/store", "programs", "flight", "needed", "passes"),
        )
    ]
    for usage in _worst_first(usages, arch)[:count]:
        work, by_machine = required_work(usage), estimates(usage, arch)
        one = by_machine[machines[-1]]
        counts = (work.steady, work.instructions, work.fp32, work.integer, work.special, work.load_store)
        rows.append(
            (
                *(usage.name, str(usage.columns), usage.dtype),
                *(f"{by_machine[name].share:.0%}" for name in machines),
                one.binds,
                *(f"{number:.1f}" for number in counts),
                str(work.programs),
                *(f"{number / 1024:.0f}" for number in (one.in_flight, one.needed)),
                str(work.passes),
            )
        )
    below, aimed = len(below_target(usages, arch)), sum(usage.dtype == "bf16" for usage in usages)
    summary = f"{below} of {aimed} kernels in bfloat16 are below target on a {machines[-1]}."
    return "\n".join([*_table(rows), "", *_LEGEND_OF_ESTIMATES, summary])


def required_work(usage: Usage) -> Work:
    """Return the work of a kernel.

    Raises:
        ValueError: the kernel was compiled without `work=True`.
    """
    if usage.work is None:
        raise ValueError(f"the work of {usage.name!r} is not known; expected kernels of triton_kernels(..., work=True)")
    return usage.work


def _machines(arch: str) -> list[str]:
    """Return the machines that run `arch`, in ascending order of memory bandwidth a clock."""
    names = [name for name in MACHINES if ARCH[name] == arch]
    if not names:
        raise ValueError(f"arch is {arch!r}; expected one of a known machine: {', '.join(sorted(set(ARCH.values())))}")
    return sorted(names, key=lambda name: MACHINES[name].bytes_a_clock)


def _to_target(usage: Usage, machine: str) -> float:
    return estimate(required_work(usage), MACHINES[machine]).share / target(usage.name)


def _worst_first(usages: Sequence[Usage], arch: str) -> list[Usage]:
    hardest = _machines(arch)[-1]
    return sorted(usages, key=lambda usage: _to_target(usage, hardest))


def to_json(usages: Sequence[Usage], libraries: Sequence[Library], arch: str) -> str:
    """Return the report as JSON: {"triton": [...], "cuda": [...]}, with the work and the estimates of each kernel."""
    kernels = [
        asdict(usage)
        | {"work": None if usage.work is None else usage.work._asdict()}
        | {"estimates": {name: one._asdict() for name, one in estimates(usage, arch).items()}}
        for usage in usages
    ]
    return json.dumps({"triton": kernels, "cuda": [asdict(one) for one in libraries]}, indent=1)
