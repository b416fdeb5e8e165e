"""How it is measured: in turn, over several sets of operands, medians; the copy bandwidth of the same run beside it."""

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
    """Medians in milliseconds; `spread` is half of what lies between the quartiles of the total, over its median.

    `saved_bytes` are without the block's output, which its reader keeps anyway.
    `allocations` are those of a pass, forward and backward, that are of 64 KiB or more; None on a GPU, where torch
    takes them from memory that it holds.
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
    """Seconds on the host's clock, when all that the device was given is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# Longer than any pass here takes on the host: the GPU is still busy with waiting when the last kernel is given to it.
_AHEAD_MS = 3.0


class Stopwatch:
    """Milliseconds between marks.

    On the CPU, on a GPU for calls so small that the host's part is all there is to see (`host`), and for whole steps:
    the host's clock. For a GPU's kernels: what the GPU took, by events. The GPU waits first, so that the kernels stand
    in line before their turn comes, and neither the host nor gaps between launches are measured.
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
    """Of the GPU's clock, measured once."""
    cycles = 10**7
    for _ in range(2):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        torch.cuda._sleep(cycles)
        after.record()
        torch.cuda.synchronize()
    return int(cycles * milliseconds / before.elapsed_time(after))


def _buffers(bytes_each: int) -> int:
    """Enough of them that none is in cache when its turn comes again, within reason."""
    return max(2, min(8, 256 * 2**20 // max(bytes_each, 1)))


def _copied(operand: Tensor) -> Tensor:
    """The same values in memory of their own."""
    return operand.detach().clone().requires_grad_(operand.requires_grad)


class Turn:
    """One provider's forward and backward pass, on the next of several sets of operands."""

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
    """Bytes at the peak of a pass, and how many large blocks of memory it takes."""
    if device == "cuda":
        return peak_bytes(lambda: turn.take(record=False), device), None
    changes = allocations(lambda: turn.take(record=False))
    return max(itertools.accumulate(changes, initial=0)), sum(change >= 2**16 for change in changes)


class CopyTurn:
    """A plain copy of one tensor into memory that is there already, of `targets` in turn: the floor's unit."""

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
    """Timings by provider, and the median milliseconds of a copy (one read, one write) of a tensor of that shape: into
    targets that are in no cache, and into one that may be, as what the allocator gives again is."""
    first = case.operands(setting, dtype, device)
    bytes_each = sum(t.nbytes for t in first.values())
    # To draw all of them anew would take longer than to measure.
    sets = [first, *({name: _copied(t) for name, t in first.items()} for _ in range(_buffers(bytes_each) - 1))]
    turns = [Turn(provider, sets, device, setting.small) for provider in providers]
    source = torch.randn(setting.shape, device=device).to(dtype)
    sources = [source.clone() for _ in sets]
    cold, warm = (CopyTurn(sources, count, device, setting.small) for count in (len(sources), 1))
    for round in range(rounds + 3):
        # The order changes from round to round, so that nobody always follows the same neighbour.
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
