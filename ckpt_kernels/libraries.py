"""Finds the compiled libraries: `_C` and `_C_cuda`, which torch loads, and `_thin`, a Python extension module."""

import pathlib

# The suffixes that setuptools gives: on Linux and macOS, and on Windows.
_SUFFIXES = (".abi3.so", ".pyd")


def library(stem: str, folder: pathlib.Path = pathlib.Path(__file__).parent) -> pathlib.Path | None:
    """The file of one library, such as `library("_C")`; None if the library was not built."""
    return next((path for suffix in _SUFFIXES if (path := folder / (stem + suffix)).exists()), None)
