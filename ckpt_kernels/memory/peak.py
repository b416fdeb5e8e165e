"""Measures the peak of the memory that tensors take."""

import itertools
import os
from collections.abc import Callable
from typing import Any

import torch


def peak_bytes(fn: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """The most bytes at one time of tensors that `fn()` creates.

    Args:
        fn: a function of no arguments.
        device: the device whose memory is counted. For the CPU, the allocations that torch's profiler records.

    Returns:
        The number of bytes, as an int.

    Raises:
        TypeError: `fn` is not callable.
        ValueError: the device is neither the CPU nor a CUDA device.
        RuntimeError: for the CPU, if a profiler of torch runs already, as within `fn` itself.

    Example:
        >>> ckpt_kernels.memory.peak_bytes(lambda: torch.ones(1024).sum()) >= 4096
        True
    """
    _check(fn)
    kind = torch.device(device).type
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


def profile_of_memory() -> torch.profiler.profile:
    """A profiler that records every allocation of CPU memory.

    Raises RuntimeError if a profiler runs already: torch has one, and a second would empty the records of the first.
    """
    if torch.autograd._profiler_enabled():
        raise RuntimeError("a profiler of torch runs; expected none, because CPU memory is counted by this profiler")
    # The profiler logs every start and stop. The level is read when the first profiler of the process starts.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)


def _check(fn: Callable[[], Any]) -> None:
    if not callable(fn):
        raise TypeError(f"fn is {type(fn).__name__}; expected a function")
