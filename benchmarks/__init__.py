"""Benchmarks: `python -m benchmarks`."""

import importlib.util
import os
import sys

_MISSING = [name for name in ("rich", "matplotlib") if importlib.util.find_spec(name) is None]
if _MISSING:
    _NEEDED = f"the benchmarks need {' and '.join(_MISSING)}: pip install 'ckpt-kernels[bench]'"
    # `python -m` imports this file before anything runs.
    raise SystemExit(_NEEDED) if sys.argv[:1] == ["-m"] else ModuleNotFoundError(_NEEDED)

# torch.compile logs fallbacks, and torch's profiler logs each start and stop. Both read the log level at import.
if sys.argv[:1] == ["-m"]:
    os.environ.setdefault("TORCH_LOGS", "-all")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
