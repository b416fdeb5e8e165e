"""Times providers in turn, over several sets of operands, with the bandwidth of a copy in the same run; medians."""

import functools
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ckpt_kernels.catalogue.block import Operands
from ckpt_kernels.memory import allocations, peak_bytes, saved_bytes_beside_output

from .cases import Case, Setting
from .providers import Provider
from .report import spread


@dataclass
class Timing:
    """Medians in milliseconds. `spread` is half the distance between the quartiles of the total, over the median.

    `saved_bytes` exclude the block's output, which the reader keeps anyway. `allocations` counts the allocations of
    64 KiB or more in a forward and backward pass; None on a GPU, where torch allocates from a cache.
    """

    forward: float
    backward: float
    spread: float
    saved_bytes: int
    peak_bytes: int
    allocations: int | None

    @property
    def total(self) -> float:
        return self.forward + self.backward


def now(device: str) -> float:
    """Seconds on the host's clock, after the device has finished all work."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# Longer than the host takes to launch any pass here, so the GPU still waits when the last kernel is launched.
_AHEAD_MS = 3.0


class Stopwatch:
    """Milliseconds between marks.

    The host's clock serves on the CPU, and on a GPU for whole steps and for calls so small that only the overhead on
    the host shows (`host`). For a GPU's kernels the GPU's events serve. The GPU waits first, so that all kernels are
    queued before the first runs, and the time contains neither the host nor gaps between launches.
    """

    def __init__(self, device: str, host: bool = False) -> None:
        self.device = device
        self.events = device == "cuda" and not host
        self.marks: list[Any] = []
        if self.events:
            torch.cuda.synchronize()
            torch.cuda._sleep(_cycles(_AHEAD_MS))
        self.mark()

    def mark(self) -> None:
        if self.events:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(now(self.device))

    def between(self) -> list[float]:
        """Milliseconds from each mark to the next."""
        pairs = list(itertools.pairwise(self.marks))
        if not self.events:
            return [(after - before) * 1e3 for before, after in pairs]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) for before, after in pairs]


@functools.cache
def _cycles(milliseconds: float) -> int:
    """The cycles of the GPU's clock in this time. The frequency is measured once."""
    cycles = 10**7
    for _ in range(2):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        torch.cuda._sleep(cycles)
        after.record()
        torch.cuda.synchronize()
    return int(cycles * milliseconds / before.elapsed_time(after))


def buffer_count(bytes_each: int) -> int:
    """The number of buffers such that none is still in cache when its turn comes again, up to a limit."""
    return max(2, min(8, 256 * 2**20 // max(bytes_each, 1)))


def _copied(operand: Tensor) -> Tensor:
    """The same values in memory of their own."""
    return operand.detach().clone().requires_grad_(operand.requires_grad)


class Turn:
    """A provider's forward and backward pass, on the next of several sets of operands."""

    def __init__(self, provider: Provider, operand_sets: list[Operands], device: str, host: bool) -> None:
        self.provider, self.operand_sets, self.device, self.host = provider, operand_sets, device, host
        self.forward: list[float] = []
        self.backward: list[float] = []
        self.count = 0
        with provider.context():
            outputs = provider.fn(**operand_sets[0])
        self.incoming = [torch.randn_like(y) for y in outputs]

    def take(self, record: bool) -> None:
        operands = self.operand_sets[self.count % len(self.operand_sets)]
        self.count += 1
        wanted = [t for t in operands.values() if t.requires_grad]
        with self.provider.context():
            watch = Stopwatch(self.device, self.host)
            outputs = self.provider.fn(**operands)
            watch.mark()
            gradients = torch.autograd.grad(outputs, wanted, self.incoming)
            watch.mark()
        forward, backward = watch.between()
        del outputs, gradients
        if record:
            self.forward.append(forward)
            self.backward.append(backward)


def _footprint(turn: Turn, device: str) -> tuple[int, int | None]:
    """The peak bytes of a pass, and the number of large memory blocks that the pass allocates."""
    if device == "cuda":
        return peak_bytes(lambda: turn.take(record=False), device), None
    changes = allocations(lambda: turn.take(record=False))
    return max(itertools.accumulate(changes, initial=0)), sum(change >= 2**16 for change in changes)


class CopyTurn:
    """A plain copy of a tensor into mapped memory, into each of `targets` in turn: the unit of the floor."""

    def __init__(self, sources: list[Tensor], targets: int, device: str, host: bool) -> None:
        self.sources = sources
        self.targets = [torch.zeros_like(source) for source in sources[:targets]]
        self.device, self.host, self.count = device, host, 0
        self.times: list[float] = []

    def take(self, record: bool) -> None:
        index = self.count % len(self.sources)
        self.count += 1
        watch = Stopwatch(self.device, self.host)
        self.targets[index % len(self.targets)].copy_(self.sources[index])
        watch.mark()
        (time,) = watch.between()
        if record:
            self.times.append(time)


def measure(
    case: Case,
    setting: Setting,
    dtype: torch.dtype,
    device: str,
    providers: list[Provider],
    rounds: int,
    tick: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Timing], float, float]:
    """Timings by provider, and the median milliseconds of two copies (one read, one write) of a tensor of that shape.

    The first copy goes into targets that are in no cache; the second into a target that may be in cache, like memory
    that the allocator returns again.
    """
    first = case.operands(setting, dtype, device)
    bytes_each = sum(t.nbytes for t in first.values())
    # Drawing all operands anew would take longer than measuring.
    sets = [first, *({name: _copied(t) for name, t in first.items()} for _ in range(buffer_count(bytes_each) - 1))]
    turns = [Turn(provider, sets, device, setting.small) for provider in providers]
    source = torch.randn(setting.shape, device=device).to(dtype)
    sources = [source.clone() for _ in sets]
    cold, warm = (CopyTurn(sources, count, device, setting.small) for count in (len(sources), 1))
    for round in range(rounds + 3):
        # The order changes from round to round, so that no provider always follows the same one.
        for turn in turns[round % len(turns) :] + turns[: round % len(turns)]:
            cold.take(record=round >= 3)
            warm.take(record=round >= 3)
            turn.take(record=round >= 3)
        tick()
    timings = {
        turn.provider.name: Timing(
            statistics.median(turn.forward),
            statistics.median(turn.backward),
            spread([f + b for f, b in zip(turn.forward, turn.backward, strict=True)]),
            saved_bytes_beside_output(turn.provider.fn, **turn.operand_sets[0]),
            *_footprint(turn, device),
        )
        for turn in turns
    }
    return timings, statistics.median(cold.times), statistics.median(warm.times)
