"""Whether the C library returns the memory of freed CPU tensors to the system, and how to have it kept."""

import ctypes
import sys
import time
from typing import NamedTuple

import torch

# From glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# The largest value that mallopt accepts. Blocks of 2 GiB or more are mapped separately in any case.
_LARGEST = 2**31 - 1
_TRIAL_BYTES = 32 * 2**20
# Below this ratio a fresh block costs little compared with the work of a kernel.
_SLOW = 2.0


def keep_freed_memory() -> bool:
    """Makes the C library keep freed memory for later tensors, instead of returning the memory to the system.

    By default glibc returns a block of 32 MiB or more when it is freed, and maps the next one anew. The system then
    clears each page at the first access, which can take longer than the kernel that writes the page. After this call
    freed memory stays with the process, whose resident memory does not fall below the peak. That is why importing this
    package never makes this call; a training script makes it once, before the first step.

    The call sets the thresholds M_MMAP_THRESHOLD and M_TRIM_THRESHOLD with glibc's `mallopt`, for the whole process,
    until the process ends. torch manages GPU memory itself, so GPU memory is not affected.

    Returns:
        Whether the thresholds were set. False on systems other than Linux, and with C libraries other than glibc
        (musl). An allocator that replaces glibc's, such as jemalloc, has settings of its own.

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
    # -1 is the largest threshold: no memory is returned from the end of the heap.
    settings = ((_MMAP_THRESHOLD, _LARGEST), (_TRIM_THRESHOLD, -1))
    return all(library.mallopt(name, value) == 1 for name, value in settings)


class FreshMemory(NamedTuple):
    """Milliseconds to write `_TRIAL_BYTES` into existing memory, and into a tensor that is created for the write."""

    warm: float
    fresh: float

    @property
    def is_slow(self) -> bool:
        """Whether page faults take longer than writing."""
        return self.fresh > _SLOW * self.warm


def fresh_memory() -> FreshMemory:
    """Measures the time to fill a fresh tensor of 32 MiB, and an existing one: the minimum of five trials each."""
    existing = torch.ones(_TRIAL_BYTES // 4)
    warm, fresh = [], []
    for _ in range(5):
        start = time.perf_counter()
        existing.fill_(1.0)
        middle = time.perf_counter()
        torch.empty(_TRIAL_BYTES // 4).fill_(1.0)
        warm.append(middle - start)
        fresh.append(time.perf_counter() - middle)
    return FreshMemory(min(warm) * 1e3, min(fresh) * 1e3)
