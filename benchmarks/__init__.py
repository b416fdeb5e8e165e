"""Benchmarks: `python -m benchmarks`."""

import importlib.util
import sys

_MISSING = [name for name in ("rich", "matplotlib") if importlib.util.find_spec(name) is None]
if _MISSING:
    _NEEDED = f"the benchmarks need {' and '.join(_MISSING)}: pip install 'ckpt-kernels[bench]'"
    # As `python -m` imports it, before anything runs.
    raise SystemExit(_NEEDED) if sys.argv[:1] == ["-m"] else ModuleNotFoundError(_NEEDED)
