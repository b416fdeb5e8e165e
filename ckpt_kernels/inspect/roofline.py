"""How fast a kernel can be by its machine code: an estimate, made without a GPU.

A multiprocessor is taken for a closed queue in which its resident programs go round. A program waits for its loads,
for exchanges between its threads and for results of its own instructions (a delay, in which others may run), takes its
share of the memory's bandwidth, and takes its turns of the scheduler, or of the pipe that it needs longer. How often it
comes round follows by mean-value analysis (Reiser and Lavenberg, 1980). The share of a copy's bandwidth is the time
that the memory alone needs over the time that a round takes. docs/roofline.md compares it with what was measured.
"""

from typing import NamedTuple

# What is aimed at, of a copy's bandwidth, in bfloat16.
FORWARD_TARGET, BACKWARD_TARGET = 0.95, 0.88
# Clocks until what another lane of the warp gives is there; until all warps of a program are past a barrier; and until
# an instruction may use the result of the one before. The first two are from published microbenchmarks of Volta to
# Hopper, rounded; the last was chosen by the table in docs/roofline.md.
_EXCHANGE, _BARRIER, _RESULT = 25, 40, 4
_SCHEDULERS = 4
_COMPUTED = ("instructions", "fp32", "integer", "special", "load/store")


class Machine(NamedTuple):
    """A card, and what a multiprocessor of it can do in a clock.

    Attributes:
        multiprocessors: how many, by NVIDIA's data sheets.
        clock: the highest, in GHz, by `nvidia-smi -q -d CLOCK`; a card may run at less.
        copy: bandwidth of a copy between two large tensors, reads and writes counted, in GB/s. Of an H200 it was
            measured (`copy_gb_per_s` in benchmarks/results/nvidia-h200); of an H100 and a B200 it is the same share of
            the data sheet's bandwidth, 0.88 of 3,350 and of 8,000: not measured.
        cache: bandwidth of the second-level cache in GB/s: of an H100 PCIe, as published; of a B200, where none is
            known here, as much more than its memory's as an H200's.
        latency: of a load under load, in clocks: between the 500 to 600 of an idle Hopper, as published, and the 1,400
            at which 23 KB a multiprocessor would be needed in flight; the error against what was measured hardly
            changes from 800 to 1,200.
        instructions, fp32, integer, special: lanes of all instructions and of these pipes: CUDA programming guide,
            "throughput of native arithmetic instructions" for 9.0, taken for 10.0 too.
        load_store: bytes between registers and the first-level cache or shared memory.
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
# What a card's code is compiled for.
ARCH = {"H100": "sm_90", "H200": "sm_90", "B200": "sm_100"}


class Work(NamedTuple):
    """What a kernel does, for an element of a tile and for a tile.

    Attributes:
        steady, instructions: lane instructions an element, in the loop over elements, and with what is done once a
            program spread over its elements.
        fp32, integer, special: those of the loop for these pipes; `load_store`, loads, stores and exchanges.
        moved: bytes an element that these move between registers and the first-level cache.
        memory: bytes an element that have to cross memory: large operands once, and partial sums.
        again: bytes an element of large operands that are read again, from the second-level cache.
        passes: how often the large operand is read that is read most often.
        elements: of a tile, those that there are.
        reads: bytes of a tile that can be asked for at once.
        programs: that are resident on a multiprocessor; `warps`, of each.
        stages: steps of a program whose loads are in flight at once.
        exchanges, barriers: that a step waits for, one after the other.
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
    """Of one kernel on one machine.

    Attributes:
        share: of the bandwidth of a copy.
        binds: what allows least by itself: "memory", "cache", "instructions", "fp32", "integer", "special",
            "load/store" or "latency"; "overlap" where each allows all of it, and they do not fall together.
        limits: the share that each alone allows, at most 1.
        in_flight: bytes of loads that a multiprocessor has in flight at most.
        needed: bytes that cover the latency at the copy's bandwidth.
    """

    share: float
    binds: str
    limits: dict[str, float]
    in_flight: float
    needed: float


def target(name: str) -> float:
    """The share that is aimed at for a kernel of this name."""
    return BACKWARD_TARGET if "backward" in name or "sums" in name else FORWARD_TARGET


def estimate(work: Work, machine: Machine) -> Estimate:
    """What the work allows on the machine."""
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
    # Alone a program cannot fill the schedulers: each of its warps waits for its own results.
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
    """Rounds a clock in a closed queue of that many customers, by mean-value analysis, one customer more at a time."""
    queues = [0.0] * len(stations)
    rate = 0.0
    for many in range(1, customers + 1):
        times = [station * (1 + queue) for station, queue in zip(stations, queues, strict=True)]
        rate = many / (delay + sum(times))
        queues = [rate * time for time in times]
    return rate
