"""Where the compiled libraries lie: `_C` and `_C_cuda`, which torch loads, and `_thin`, a module of Python."""

import pathlib

# As setuptools names them: on Linux and macOS, and on Windows.
_SUFFIXES = (".abi3.so", ".pyd")


def library(stem: str, folder: pathlib.Path = pathlib.Path(__file__).parent) -> pathlib.Path | None:
    """The file of one library, such as `library("_C")`; None where it was not built."""
    return next((path for suffix in _SUFFIXES if (path := folder / (stem + suffix)).exists()), None)
