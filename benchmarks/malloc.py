"""Raises the C allocator's thresholds, which glibc reads when a process starts."""

import os
import sys

# glibc returns large freed blocks to the system, and allocates them anew for the next output, page fault by page fault.
# The page faults can cost more than a kernel. With these two settings glibc keeps the blocks.
RAISED_THRESHOLDS = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}


def raise_malloc_thresholds(module: str) -> None:
    """Restarts `module` with raised thresholds, unless they are raised already."""
    if any(name not in os.environ for name in RAISED_THRESHOLDS):
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], os.environ | RAISED_THRESHOLDS)
