"""Measures the peak of the memory that tensors take."""

import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..arguments import shown


def peak_bytes(fn: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """The most bytes at one time of tensors that `fn()` creates.

    Args:
        fn: a function of no arguments.
        device: the device whose memory is counted. For the CPU, the allocations that torch's profiler records.

    Returns:
        The number of bytes, as an int.

    Raises:
        TypeError: `fn` is not callable, or `device` names no device.
        ValueError: the device is neither the CPU nor a CUDA device.
        RuntimeError: for the CPU, if a profiler of torch runs already, as within `fn` itself.

    Example:
        >>> ckpt_kernels.memory.peak_bytes(lambda: torch.ones(1024).sum()) >= 4096
        True
    """
    _check(fn)
    try:
        kind = torch.device(device).type
    except (TypeError, RuntimeError):
        raise TypeError(f"device is {shown(device)}; expected a torch.device or the name of one") from None
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device is {device}; expected the CPU or a CUDA device, whose memory is counted")
    if kind == "cuda":
        torch.cuda.synchronize(device)
        start = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        fn()
        return torch.cuda.max_memory_allocated(device) - start
    return max(itertools.accumulate(allocations(fn), initial=0))


def allocations(fn: Callable[[], Any]) -> list[int]:
    """The sizes of all blocks of CPU memory that tensors allocate while `fn()` runs; freed blocks are negative."""
    _check(fn)
    with profile_of_memory() as profile:
        fn()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


# Torch has one profiler for all threads.
_profiler = threading.RLock()


@contextlib.contextmanager
def profile_of_memory() -> Iterator[Any]:
    """A context in which a profiler records every allocation of CPU memory. Other threads wait for its end.

    Raises RuntimeError if a profiler runs already in this thread: a second would empty the records of the first.
    """
    with _profiler:
        if torch.autograd._profiler_enabled():
            raise RuntimeError(
                "a profiler of torch runs; expected none, because CPU memory is counted by this profiler"
            )
        # The profiler logs every start and stop. The level is read when the first profiler of the process starts.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        profiled = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        with profiled as profile:
            yield profile


def _check(fn: Callable[[], Any]) -> None:
    if not callable(fn):
        raise TypeError(f"fn is {type(fn).__name__}; expected a function")
