"""Benchmarks: `python -m benchmarks`."""

import importlib.util
import os
import sys

_MISSING = [name for name in ("rich", "matplotlib") if importlib.util.find_spec(name) is None]
if _MISSING:
    _NEEDED = f"the benchmarks need {' and '.join(_MISSING)}: pip install 'ckpt-kernels[bench]'"
    # As `python -m` imports it, before anything runs.
    raise SystemExit(_NEEDED) if sys.argv[:1] == ["-m"] else ModuleNotFoundError(_NEEDED)

# torch.compile prints of its own fallbacks, torch's profiler of each start and stop; both look when torch is imported.
if sys.argv[:1] == ["-m"]:
    os.environ.setdefault("TORCH_LOGS", "-all")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
