"""The C allocator's thresholds, which are read when a process starts."""

import os
import sys

# glibc gives large blocks back to the system when they are freed, and takes them anew, page fault by page fault,
# for the next output; that can cost more than a kernel. With these two settings it keeps them.
RAISED_THRESHOLDS = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}


def raise_malloc_thresholds(module: str) -> None:
    """Starts `module` again with raised thresholds, if they are not."""
    if any(name not in os.environ for name in RAISED_THRESHOLDS):
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], os.environ | RAISED_THRESHOLDS)
