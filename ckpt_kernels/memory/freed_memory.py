"""Memory of CPU tensors that were freed: whether the C library gives it back to the system, and how to have it kept."""

import ctypes
import sys
import time
from typing import NamedTuple

import torch

# From glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# The most that the call takes: blocks from 2 GiB are mapped apart all the same.
_LARGEST = 2**31 - 1
_TRIAL_BYTES = 32 * 2**20
# Below this a fresh block costs little beside what a kernel does with it.
_SLOW = 2.0


def keep_freed_memory() -> bool:
    """Has the C library keep freed memory for later tensors, instead of giving it back to the system.

    By default glibc gives a block of 32 MiB or more back when it is freed, and takes the next one anew. The system then
    clears each page when it is first touched, which can take longer than the kernel that writes it. Afterwards what is
    freed stays with the process: its resident memory does not fall below its peak. That is why importing this package
    never makes this call; a training script makes it once, before its first step.

    It sets the thresholds M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of glibc's `mallopt`, for the whole process, until it
    ends. Memory of GPUs is torch's own, and not concerned.

    Returns:
        Whether it was done. False where there is nothing to call: on other systems than Linux, and with other C
        libraries than glibc (musl). An allocator that was put before glibc's, such as jemalloc, has its own settings.

    Example:
        >>> from ckpt_kernels import memory
        >>> memory.keep_freed_memory() in (True, False)  # once, before the first step
        True
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not (hasattr(library, "gnu_get_libc_version") and hasattr(library, "mallopt")):
        return False
    # -1 is the largest threshold there is: nothing is given back from the end of the heap.
    settings = ((_MMAP_THRESHOLD, _LARGEST), (_TRIM_THRESHOLD, -1))
    return all(library.mallopt(name, value) == 1 for name, value in settings)


class FreshMemory(NamedTuple):
    """Milliseconds to write `_TRIAL_BYTES`: into memory that is there, and into a tensor made for it."""

    warm: float
    fresh: float

    @property
    def is_slow(self) -> bool:
        """Whether page faults take longer than the writing itself."""
        return self.fresh > _SLOW * self.warm


def fresh_memory() -> FreshMemory:
    """How long a fresh tensor of 32 MiB takes to fill, beside one that is there: the least of five turns each."""
    held = torch.ones(_TRIAL_BYTES // 4)
    warm, fresh = [], []
    for _ in range(5):
        before = time.perf_counter()
        held.fill_(1.0)
        between = time.perf_counter()
        torch.empty(_TRIAL_BYTES // 4).fill_(1.0)
        warm.append(between - before)
        fresh.append(time.perf_counter() - between)
    return FreshMemory(min(warm) * 1e3, min(fresh) * 1e3)
