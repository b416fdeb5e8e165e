"""Estimates from the machine code how fast a kernel can be.

The model is a closed queueing network: the resident programs of a multiprocessor are the customers. In each round a
program waits for loads, for exchanges between threads and for results of its own instructions (a delay, during which
other programs run), then queues for memory bandwidth, and then for the scheduler or the busiest pipe. Mean-value
analysis (Reiser and Lavenberg, 1980) gives the rate of rounds. The share of a copy's bandwidth is the time that memory
alone needs for a round over the time of a round. docs/roofline.md compares estimates with measurements.
"""

from typing import NamedTuple

# The targets, as shares of a copy's bandwidth in bfloat16.
FORWARD_TARGET, BACKWARD_TARGET = 0.95, 0.88
# Latencies in clocks: of a warp shuffle, of a barrier over all warps of a program, and from one instruction to the next
# that depends on it. The first two are rounded from published microbenchmarks of Volta to Hopper; the last was fitted
# to the table in docs/roofline.md.
_EXCHANGE, _BARRIER, _RESULT = 25, 40, 4
_SCHEDULERS = 4
_COMPUTED = ("instructions", "fp32", "integer", "special", "load/store")


class Machine(NamedTuple):
    """A card, and the throughput of one of its multiprocessors.

    Attributes:
        multiprocessors: their number, from NVIDIA's data sheets.
        clock: the highest clock in GHz, from `nvidia-smi -q -d CLOCK`; a card may run slower.
        copy: bandwidth in GB/s of a copy between two large tensors; reads and writes both count. The figure of the H200
            was measured (`copy_gb_per_s` in benchmarks/results/nvidia-h200). Those of the H100 and the B200 were not:
            they assume the same share of the data sheet's bandwidth, 0.88 of 3,350 and of 8,000.
        cache: bandwidth of the second-level cache in GB/s, as published for an H100 PCIe. No figure for the B200 was at
            hand; the entry assumes the H200's ratio of cache to memory bandwidth.
        latency: clocks of a load when memory is busy. The value lies between the published 500 to 600 of an idle Hopper
            and the 1,400 at which 23 KB a multiprocessor would have to be in flight. From 800 to 1,200 the error
            against measurements hardly changes.
        instructions, fp32, integer, special: lanes a clock, of all instructions and of these pipes, from the CUDA
            programming guide, "throughput of native arithmetic instructions" for 9.0; used for 10.0 too.
        load_store: bytes a clock between registers and the first-level cache or shared memory.
    """

    multiprocessors: int
    clock: float
    copy: float
    cache: float = 5600.0
    latency: int = 1000
    instructions: int = 128
    fp32: int = 128
    integer: int = 64
    special: int = 16
    load_store: int = 128

    @property
    def bytes_a_clock(self) -> float:
        """A multiprocessor's share of the copy bandwidth."""
        return self.copy / self.multiprocessors / self.clock


MACHINES = {
    "H100": Machine(132, 1.98, 2950.0),
    "H200": Machine(132, 1.98, 4220.0),
    "B200": Machine(148, 1.965, 7040.0, cache=9300.0),
}
# The architecture that a card's code is compiled for.
ARCH = {"H100": "sm_90", "H200": "sm_90", "B200": "sm_100"}


class Work(NamedTuple):
    """The work of a kernel, for an element of a tile and for a tile.

    Attributes:
        steady: lane instructions an element in the loop over elements.
        instructions: the same, plus the instructions that a program executes once, spread over the program's elements.
        fp32, integer, special, load_store: the instructions of the loop by pipe; `load_store` has loads, stores and
            exchanges.
        moved: bytes an element that `load_store` moves between registers and the first-level cache.
        memory: bytes an element that must cross memory: large operands once, and partial sums.
        again: bytes an element of large operands that are read again, from the second-level cache.
        passes: the largest number of times that a large operand is read.
        elements: the elements of a tile that lie within the row.
        reads: bytes of a tile that can be requested at once.
        programs: resident programs a multiprocessor.
        warps: warps a program.
        stages: steps of a program whose loads are in flight at once.
        exchanges, barriers: the number of each in a step, all in sequence.
    """

    steady: float
    instructions: float
    fp32: float
    integer: float
    special: float
    load_store: float
    moved: float
    memory: float
    again: float
    passes: int
    elements: float
    reads: float
    programs: int
    warps: int
    stages: int
    exchanges: int
    barriers: int


class Estimate(NamedTuple):
    """The estimate for one kernel on one machine.

    Attributes:
        share: the share of a copy's bandwidth.
        binds: the tightest limit: "memory", "cache", "instructions", "fp32", "integer", "special", "load/store" or
            "latency"; "overlap" if each alone allows the whole bandwidth, but not all of them together.
        limits: the share that each limit alone allows, at most 1.
        in_flight: the most bytes of loads that a multiprocessor has in flight.
        needed: the bytes in flight that hide the latency at a copy's bandwidth.
    """

    share: float
    binds: str
    limits: dict[str, float]
    in_flight: float
    needed: float


def target(name: str) -> float:
    """Return the target share for a kernel of this name."""
    return BACKWARD_TARGET if "backward" in name or "sums" in name else FORWARD_TARGET


def estimate(work: Work, machine: Machine) -> Estimate:
    """Estimate the share of a copy's bandwidth that a kernel reaches on a machine."""
    clocks = {
        "memory": work.memory / machine.bytes_a_clock,
        "cache": (work.memory + work.again) / machine.bytes_a_clock * machine.copy / machine.cache,
        "instructions": work.instructions / machine.instructions,
        "fp32": work.fp32 / machine.fp32,
        "integer": work.integer / machine.integer,
        "special": work.special / machine.special,
        "load/store": work.moved / machine.load_store,
    }
    computing = max(clocks[name] for name in _COMPUTED) * work.elements
    memory, fetching = clocks["memory"] * work.elements, max(clocks["memory"], clocks["cache"]) * work.elements
    # A single program cannot fill the schedulers, since each warp waits for its own results.
    alone = computing * max(_RESULT * _SCHEDULERS / work.warps - 1, 0)
    delay = machine.latency + work.exchanges * _EXCHANGE + work.barriers * _BARRIER + alone
    rounds = work.programs * max(work.stages - 1, 1)
    limits = {name: min(clocks["memory"] / one, 1.0) if one else 1.0 for name, one in clocks.items()}
    limits["latency"] = min(rounds * memory / (delay + fetching + computing), 1.0)
    share = min(_rate(rounds, delay, fetching, computing) * memory, 1.0)
    binds = min(limits, key=limits.__getitem__)
    if limits[binds] == 1.0:
        binds = "memory" if share >= FORWARD_TARGET else "overlap"
    return Estimate(share, binds, limits, rounds * work.reads, machine.bytes_a_clock * machine.latency)


def _rate(customers: int, delay: float, *stations: float) -> float:
    """Return the rounds a clock in a closed queueing network, by mean-value analysis: one more customer at a time."""
    queues = [0.0] * len(stations)
    rate = 0.0
    for many in range(1, customers + 1):
        times = [station * (1 + queue) for station, queue in zip(stations, queues, strict=True)]
        rate = many / (delay + sum(times))
        queues = [rate * time for time in times]
    return rate
